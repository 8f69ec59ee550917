//! Pictures of a seed, as this program made them before its networks were told a `Condition`: no change of structure may
//! move them. Other instruction sets round otherwise, so that the last bits may.

use candle_core::Device;
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
        let model = Model::Teacher { denoiser, sampler: Sampler::Heun, n_steps: 4, guidance_scale: 1.0 };
        let pictures = model.pictures_of_seed(5, 2, folder.size().unwrap(), &labels, 2).unwrap();
        let all: Vec<f64> = pictures.iter().map(|value| f64::from(*value)).collect();
        let n = all.len() as f64;
        let mut found: Vec<f64> = (0..6).map(|i| all[i * all.len() / 6]).collect();
        found.extend([all.iter().sum::<f64>() / n, (all.iter().map(|x| x * x).sum::<f64>() / n).sqrt()]);
        for (found, expected) in found.iter().zip(values.iter().chain(&[mean, root_mean_square])) {
            assert!((found - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{found}, before {expected}");
        }
    }
}
