//! Pictures of a seed, as this program made them before its networks were told a `Condition`, and trainings: no change of
//! structure may move them. Other instruction sets round otherwise, so that the last bits may.

mod common;

use candle_core::Device;
use common::Workplace;
use dmd::sample::{Model, Sampler, labels_in_turn};
use dmd_models::ModelFolder;
use std::path::Path;

/// `dmd sample FOLDER --seed 5 -n 2 --steps 4`: six values spread over all, their mean and root mean square.
const BEFORE: [(&str, [f64; 6], [f64; 2]); 2] = [
    (
        "models/pretrained/emoji-16",
        [1.032_881_379, 0.744_654_119, 1.248_016_715, 0.417_314_559, 1.212_121_010, 1.528_801_918],
        [0.706_901_527, 1.149_725_129],
    ),
    (
        "models/tests/fixtures/edm-tiny",
        [0.680_847_824, 0.945_506_334, 0.129_215_375, -2.814_487_219, -0.617_745_936, 2.602_952_480],
        [0.115_426_414, 2.211_663_235],
    ),
];

#[test]
fn pictures_of_a_seed_stay_what_they_were() {
    for (folder, values, [mean, root_mean_square]) in BEFORE {
        let folder = ModelFolder::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &Device::Cpu).unwrap();
        let denoiser = folder.denoiser(&Device::Cpu).unwrap();
        let labels = labels_in_turn(2, denoiser.n_classes());
        let model = Model::teacher(denoiser, Sampler::Heun, 4, 1.0);
        let [_, height, width] = folder.sample_shape().unwrap();
        let pictures = model.pictures_of_seed(5, 2, [height, width], &labels, 2).unwrap();
        let all: Vec<f64> = pictures.iter().map(|value| f64::from(*value)).collect();
        let n = all.len() as f64;
        let mut found: Vec<f64> = (0..6).map(|i| all[i * all.len() / 6 + i]).collect();
        found.extend([all.iter().sum::<f64>() / n, (all.iter().map(|x| x * x).sum::<f64>() / n).sqrt()]);
        for (found, expected) in found.iter().zip(values.iter().chain(&[mean, root_mean_square])) {
            assert!((found - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{found}, before {expected}");
        }
    }
}

/// Losses and gradient of the last of three updates of every recipe, and of four of a teacher, as they were before both
/// were trained by one loop. Other instruction sets round otherwise; the first update follows signs of gradients.
#[test]
fn trainings_go_as_they_went() {
    let w = Workplace::new().with_pictures().with_fixture("edm-tiny");
    w.write(
        "teacher/dmd.json",
        r#"{"kind": "teacher", "version": "", "classes": ["blue", "red"], "null_class": true}"#,
    );
    w.ok("pairs teacher --out pairs -n 6 --steps 2");
    let check = |line: &str, expected: &[(&str, f64)]| {
        let found = w.ok(line);
        for (name, expected) in expected {
            let found = found[name].as_f64().unwrap();
            assert!((found / expected - 1.0).abs() < 5e-3, "{line}: {name} is {found}, before {expected}");
        }
    };
    for (recipe, loss_dm, loss_fake, grad_norm) in [
        ("sid", 1.513_521_9e-4, 0.264_295_35, 1.109_052_3e-3),
        ("fast", 2.289_242_2e-5, 1.107_990_26, 2.725_729_5e-4),
        ("sida", 1.518_485_4e-4, 0.264_269_87, 1.136_123_1e-3),
        ("plain", 3.680_719_6e-3, 0.512_183_03, 2.871_861_6e-2),
        ("dmd", 3.769_571_0e-3, 0.511_975_87, 0.713_227_32),
        ("dmd2", 3.591_989_9e-3, 0.507_311_21, 2.788_916_7e-2),
        ("f-js", 3.654_867_6e-3, 0.512_164_21, 2.845_258_9e-2),
    ] {
        // What a recipe has no use for is refused.
        let more = match recipe {
            "sida" | "dmd2" | "f-js" => "--data pictures",
            "dmd" => "--pairs pairs",
            _ => "",
        };
        let line = format!(
            "distill --teacher teacher --recipe {recipe} {more} --out {recipe} --steps 3 --batch 4 --set accumulate=2"
        );
        check(&line, &[("loss_dm", loss_dm), ("loss_fake", loss_fake), ("grad_norm", grad_norm)]);
    }
    check(
        "teacher train --data pictures --size 8 --unet unet.json --steps 4 --batch 4 --accumulate 2 --out new",
        &[("loss", 1.193_869_59), ("validation_loss", 1.100_621_46), ("grad_norm", 1.729_286_27)],
    );
}
