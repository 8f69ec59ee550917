//! One training step of a picture model, drawn.

mod common;
use common::Workplace;

#[test]
fn a_step_of_a_picture_model_is_drawn_level_by_level() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let alone = w.ok("ablate --teacher teacher --out alone");
    let levels = alone["levels"].as_array().unwrap();
    assert!(levels.len() >= 5, "{alone}");
    // The fake score of a run that has not begun is the teacher: nothing to follow.
    assert!(levels.iter().all(|l| l["gradient"] == 0.0 && l["real_error"].as_f64().unwrap() > 0.0), "{alone}");
    w.write("distill.toml", "ratio = 2\n[generator]\nwarmup = 1\n");
    w.ok("distill --teacher teacher --out run --config distill.toml --steps 3 --batch 2 --device cpu");
    let with_run = w.ok("ablate --teacher teacher --run run --out with-run");
    assert!(with_run["levels"].as_array().unwrap().iter().all(|l| l["gradient"].as_f64().unwrap() > 0.0), "{with_run}");
    assert!(image::open(w.path("with-run/levels.png")).unwrap().width() > 600);
    w.refuses("ablate --teacher teacher --run nowhere --out other", 1, &["the generator", "nowhere"]);
    w.refuses("ablate --teacher teacher --generator teacher --out other", 1, &["holds no generator"]);
}
