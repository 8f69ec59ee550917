//! `scheduler_config.json`: which noise levels a model was trained on and what its output means. The settings of
//! diffusers' own samplers (spacing, solver order, thresholding) do not concern a model's meaning and are left alone;
//! the file is carried through unchanged.

use crate::noise_levels::Betas;
use crate::{Error, NoiseLevels, Prediction, Result};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// A diffusers scheduler, read for what it says about the model.
#[derive(Clone, Debug)]
pub struct Scheduler {
    json: Value,
    class_name: String,
    fields: Fields,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct Fields {
    num_train_timesteps: usize,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: String,
    trained_betas: Option<Vec<f64>>,
    prediction_type: String,
    rescale_betas_zero_snr: bool,
    clip_sample: Option<bool>,
    clip_sample_range: f64,
    use_flow_sigmas: bool,
    variance_type: Option<String>,
    sigma_min: Option<f64>,
    sigma_max: Option<f64>,
    sigma_data: f64,
    sigma_schedule: String,
    rho: f64,
}

impl Default for Fields {
    fn default() -> Self {
        Fields {
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: "linear".into(),
            trained_betas: None,
            prediction_type: "epsilon".into(),
            rescale_betas_zero_snr: false,
            clip_sample: None,
            clip_sample_range: 1.0,
            use_flow_sigmas: false,
            variance_type: None,
            sigma_min: None,
            sigma_max: None,
            sigma_data: 0.5,
            sigma_schedule: "karras".into(),
            rho: 7.0,
        }
    }
}

/// Schedulers that are different samplers over the same beta schedule.
const BETA_SCHEDULERS: [&str; 12] = [
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "KDPM2DiscreteScheduler",
    "DEISMultistepScheduler",
];
const EDM_SCHEDULERS: [&str; 2] = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"];
/// Above this many levels a table is a mistake in the file, not a schedule.
const MAX_TIMESTEPS: usize = 1_000_000;

impl Scheduler {
    /// Reads `scheduler_config.json`; an unknown scheduler, schedule or prediction type is refused by name.
    pub fn from_json(path: &Path, text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(|e| Error::file(path, format!("not JSON: {e}")))?;
        Self::from_value(json).map_err(|e| Error::file(path, e))
    }

    /// The scheduler of a model trained here: `EDMEulerScheduler`, 1000 levels, ρ = 7.
    pub fn edm(sigma_min: f64, sigma_max: f64, sigma_data: f64) -> Result<Self> {
        Self::from_value(serde_json::json!({
            "_class_name": "EDMEulerScheduler",
            "_diffusers_version": "0.42.0",
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "sigma_data": sigma_data,
            "sigma_schedule": "karras",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "rho": 7.0,
            "final_sigmas_type": "zero",
        }))
    }

    fn from_value(json: Value) -> Result<Self> {
        let class_name = json.get("_class_name").and_then(Value::as_str).unwrap_or_default().to_string();
        let fields: Fields = serde_json::from_value(json.clone()).map_err(|e| Error::Config(e.to_string()))?;
        let scheduler = Scheduler { json, class_name, fields };
        scheduler.check()?;
        Ok(scheduler)
    }

    fn check(&self) -> Result<()> {
        let f = &self.fields;
        let refuse = |message: String| Err(Error::Config(message));
        if !self.is_edm() && !BETA_SCHEDULERS.contains(&self.class_name.as_str()) {
            return refuse(format!(
                "_class_name is \"{}\", supported: {} and {}",
                self.class_name,
                BETA_SCHEDULERS.join(", "),
                EDM_SCHEDULERS.join(", ")
            ));
        }
        if f.use_flow_sigmas {
            return refuse("use_flow_sigmas is true: flow-matching models are not supported".into());
        }
        if f.variance_type.as_deref().is_some_and(|v| v.starts_with("learned")) {
            return refuse(format!(
                "variance_type is {}: learned variances are not supported",
                f.variance_type.as_deref().unwrap_or_default()
            ));
        }
        if !(2..=MAX_TIMESTEPS).contains(&f.num_train_timesteps) {
            return refuse(format!("num_train_timesteps is {}, expected 2 to {MAX_TIMESTEPS}", f.num_train_timesteps));
        }
        let predictions: &[&str] = if self.is_edm() {
            &["epsilon", "v_prediction"]
        } else {
            &["epsilon", "v_prediction", "sample", "original_sample"]
        };
        if !predictions.contains(&f.prediction_type.as_str()) {
            return refuse(format!(
                "prediction_type is \"{}\", supported: {}",
                f.prediction_type,
                predictions.join(", ")
            ));
        }
        if self.is_edm() && (f.sigma_data.is_nan() || f.sigma_data <= 0.0) {
            return refuse(format!("sigma_data is {}, expected a positive number", f.sigma_data));
        }
        self.levels().map(|_| ())
    }

    fn is_edm(&self) -> bool {
        EDM_SCHEDULERS.contains(&self.class_name.as_str())
    }

    /// The file as it was.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// diffusers' class.
    pub fn class_name(&self) -> &str {
        &self.class_name
    }

    /// What the network's output means.
    pub fn prediction(&self) -> Prediction {
        let negative = self.fields.prediction_type == "v_prediction";
        match (self.is_edm(), self.fields.prediction_type.as_str()) {
            (true, _) => Prediction::Edm { sigma_data: self.fields.sigma_data, negative },
            (false, "epsilon") => Prediction::Epsilon,
            (false, "v_prediction") => Prediction::V,
            (false, _) => Prediction::Sample,
        }
    }

    /// The noise levels of training.
    pub fn levels(&self) -> Result<NoiseLevels> {
        let f = &self.fields;
        if self.is_edm() {
            let (min, max) = (f.sigma_min.unwrap_or(0.002), f.sigma_max.unwrap_or(80.0));
            return match f.sigma_schedule.as_str() {
                "karras" => NoiseLevels::karras(f.num_train_timesteps, min, max, f.rho),
                "exponential" => NoiseLevels::exponential(f.num_train_timesteps, min, max),
                other => Err(Error::Config(format!("sigma_schedule is \"{other}\", supported: karras, exponential"))),
            };
        }
        let betas = match (&f.trained_betas, f.beta_schedule.as_str()) {
            (Some(betas), _) => Betas::Trained(betas.clone()),
            (None, "linear") => Betas::Linear,
            (None, "scaled_linear") => Betas::ScaledLinear,
            (None, "squaredcos_cap_v2") => Betas::SquaredCosine,
            (None, other) => {
                return Err(Error::Config(format!(
                    "beta_schedule is \"{other}\", supported: linear, scaled_linear, squaredcos_cap_v2"
                )));
            }
        };
        NoiseLevels::variance_preserving(
            &betas,
            f.num_train_timesteps,
            [f.beta_start, f.beta_end],
            f.rescale_betas_zero_snr,
        )
    }

    /// The range that diffusers' sampler clamps x0 to: on by default for DDPM and DDIM.
    pub fn clip(&self) -> Option<f64> {
        let default = matches!(self.class_name.as_str(), "DDPMScheduler" | "DDIMScheduler");
        self.fields.clip_sample.unwrap_or(default).then_some(self.fields.clip_sample_range)
    }
}
