//! `scheduler_config.json`: which noise levels a model was trained on and what its output means. Every key is honoured,
//! refused, or known to be a setting of diffusers' own sampler (spacing, solver order, thresholding), which does not
//! concern a model's meaning. `schedulers.json` has the keys of each class and their defaults, as diffusers 0.42 has
//! them; the file itself is carried through unchanged.

use super::json;
use crate::networks::config::nearest;
use crate::noise_levels::Betas;
use crate::{Error, NoiseLevels, Prediction, Result, limits};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

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

/// The keys of every class that is taken, with their defaults.
static CLASSES: LazyLock<BTreeMap<String, Map<String, Value>>> = LazyLock::new(|| {
    json::parse(Path::new("schedulers.json"), include_str!("schedulers.json"))
        .and_then(|table| serde_json::from_value(table).map_err(|e| Error::Config(e.to_string())))
        .expect("the table is part of the program, and a test reads it")
});

/// Keys that say what the model is; all others are settings of a sampler.
const MEANINGS: [&str; 15] = [
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
    "timestep_type",
    "variance_type",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "sigma_schedule",
    "rho",
];

impl Scheduler {
    /// Reads `scheduler_config.json`; an unknown scheduler, key, schedule or prediction type is refused by name.
    pub fn from_json(path: &Path, text: &str) -> Result<Self> {
        Self::from_value(json::parse(path, text)?).map_err(|e| Error::file(path, e))
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

    pub(super) fn from_value(json: Value) -> Result<Self> {
        let keys = json.as_object().ok_or_else(|| Error::Config("not a JSON object".into()))?;
        let class_name = match keys.get("_class_name").map(|class| (class, class.as_str())) {
            Some((_, Some(class))) => class.to_string(),
            Some((other, None)) => return Err(Error::Config(format!("_class_name is {other}, expected a name"))),
            None => return Err(Error::Config("has no _class_name, which names the scheduler".into())),
        };
        let Some(defaults) = CLASSES.get(&class_name) else {
            return Err(Error::Config(format!("_class_name is \"{class_name}\", {}", why_not(&class_name))));
        };
        let fields = fields(defaults, keys, &class_name)?;
        let scheduler = Scheduler { json, class_name, fields };
        scheduler.check()?;
        Ok(scheduler)
    }

    /// Whether diffusers' class of this name, which a folder's index may give, would make the same model of the file.
    pub(super) fn same_as(&self, class: &str) -> bool {
        let mut json = self.json.clone();
        json["_class_name"] = class.into();
        let same = |other: Scheduler| Ok(other.prediction() == self.prediction() && other.levels()? == self.levels()?);
        class == self.class_name || Self::from_value(json).and_then(same).unwrap_or(false)
    }

    fn check(&self) -> Result<()> {
        let f = &self.fields;
        let refuse = |message: String| Err(Error::Config(message));
        if f.use_flow_sigmas || f.prediction_type == "flow_prediction" {
            return refuse(format!(
                "use_flow_sigmas is {} and prediction_type \"{}\": {FLOW}",
                f.use_flow_sigmas, f.prediction_type
            ));
        }
        match self.json.get("timestep_type").map(|kind| kind.as_str().unwrap_or_default()) {
            Some("continuous") if f.prediction_type == "v_prediction" => {
                return refuse("timestep_type is continuous with v_prediction: the network is told ln(sigma)/4 instead of a timestep, which is not supported".into());
            }
            None | Some("discrete" | "continuous") => {}
            Some(other) => return refuse(format!("timestep_type is \"{other}\", expected discrete or continuous")),
        }
        if let Some(learned) = f.variance_type.as_deref().filter(|v| v.starts_with("learned")) {
            return refuse(format!("variance_type is {learned}: learned variances are not supported"));
        }
        limits::check("num_train_timesteps", f.num_train_timesteps, limits::NOISE_LEVELS)?;
        if self.class_name == "UnCLIPScheduler" && f.beta_schedule != "squaredcos_cap_v2" {
            return refuse(format!(
                "beta_schedule is \"{}\", UnCLIPScheduler has squaredcos_cap_v2 alone",
                f.beta_schedule
            ));
        }
        if let Some(betas) = &f.trained_betas
            && betas.len() != f.num_train_timesteps
        {
            return refuse(format!(
                "trained_betas has {} entries, num_train_timesteps is {}: expected one for each",
                betas.len(),
                f.num_train_timesteps
            ));
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
        if !(f.sigma_data > 0.0 && f.sigma_data.is_finite()) {
            return refuse(format!("sigma_data is {}, expected a positive number", f.sigma_data));
        }
        if !(f.clip_sample_range > 0.0 && f.clip_sample_range.is_finite()) {
            return refuse(format!("clip_sample_range is {}, expected a positive number", f.clip_sample_range));
        }
        self.levels().map(|_| ())
    }

    fn is_edm(&self) -> bool {
        self.class_name.starts_with("EDM")
    }

    /// The text of the file, as Python reads it.
    pub fn to_json(&self) -> String {
        json::text(&self.json)
    }

    /// The file as it was; Python's infinities are strings of their name.
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

    /// The range that diffusers' sampler clamps x0 to, for the classes that do.
    pub fn clip(&self) -> Option<f64> {
        self.fields.clip_sample.unwrap_or(false).then_some(self.fields.clip_sample_range)
    }
}

/// What the keys of a file say, on top of the defaults of its class.
fn fields(defaults: &Map<String, Value>, keys: &Map<String, Value>, class: &str) -> Result<Fields> {
    let mut whole: Map<String, Value> = defaults.clone();
    let mut said_by: BTreeMap<String, &str> = BTreeMap::new();
    // Keys that begin with an underscore are diffusers' own bookkeeping (class name, version, origin).
    for (written, value) in keys.iter().filter(|(key, _)| !key.starts_with('_')) {
        let (key, value) = modern(written, value)?;
        let known = defaults.contains_key(key);
        if !known {
            // diffusers keeps the settings of the scheduler before when a pipeline changes to another, and ignores them.
            let elsewhere = CLASSES.values().any(|keys| keys.contains_key(key)) || OF_OLD_SAMPLERS.contains(&key);
            if !elsewhere {
                let known: Vec<&str> = defaults.keys().map(String::as_str).collect();
                return Err(Error::Config(format!("unknown key \"{written}\"{}", nearest(written, &known))));
            }
            if MEANINGS.contains(&key) && !says_nothing(key, &value) {
                return Err(Error::Config(format!(
                    "{written} is {}, which {class} does not have and diffusers passes over: take it out, or name the scheduler that the model was trained with",
                    json::shown(&value)
                )));
            }
            continue;
        }
        if let Some(other) = said_by.insert(key.to_string(), written)
            && whole[key] != value
        {
            return Err(Error::Config(format!("{other} and {written} say two different things: take one of them out")));
        }
        whole.insert(key.to_string(), value);
        // One at a time, so that the message can name it.
        if let Err(reason) = serde_json::from_value::<Fields>(Value::Object(whole.clone())) {
            return Err(Error::Config(format!("{written} is {}: {reason}", json::shown(&keys[written]))));
        }
    }
    serde_json::from_value(Value::Object(whole)).map_err(|e| Error::Config(e.to_string()))
}

/// A key and its value as diffusers 0.42 spells them; releases 0.0 to 0.10 had other names.
fn modern<'a>(key: &'a str, value: &Value) -> Result<(&'a str, Value)> {
    Ok(match key {
        "predict_epsilon" => match value {
            Value::Bool(true) => ("prediction_type", "epsilon".into()),
            Value::Bool(false) => ("prediction_type", "sample".into()),
            _ => return Err(Error::Config(format!("predict_epsilon is {value}, expected true or false"))),
        },
        "timesteps" | "num_timesteps" => ("num_train_timesteps", value.clone()),
        "clip_predicted_image" => ("clip_sample", value.clone()),
        "timestep_values" if !value.is_null() => {
            return Err(Error::Config("timestep_values is given: a model of chosen timesteps is not supported".into()));
        }
        _ => (key, value.clone()),
    })
}

/// Settings of samplers that diffusers no longer has.
const OF_OLD_SAMPLERS: [&str; 6] =
    ["tensor_format", "timestep_values", "clip_alpha_at_one", "denoise_final", "set_alpha_to_zero", "dtype"];

/// Whether a key that a class does not have would say no more than its absence.
fn says_nothing(key: &str, value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(false))
        || matches!((key, value.as_str()), ("prediction_type", Some("epsilon")) | ("timestep_type", Some("discrete")))
        || (key == "variance_type" && value.as_str().is_some_and(|variance| variance.starts_with("fixed")))
}

const FLOW: &str = "flow matching, whose networks predict the velocity between noise and picture, is not supported";

/// Why a scheduler is not taken.
fn why_not(class: &str) -> String {
    let begins = |names: &[&str]| names.iter().any(|name| class.starts_with(name));
    let reason = if begins(&["FlowMa", "LTXEuler", "Helios", "MiniMaxH3", "Piflow"]) {
        FLOW
    } else if begins(&["SCM"]) {
        "TrigFlow, whose noise levels are angles, is not supported"
    } else if begins(&["CMStochastic", "ConsistencyDecoder"]) {
        "a consistency model makes its pictures in one pass already, and is no teacher"
    } else if begins(&["VQDiffusion", "Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound"]) {
        "its model predicts tokens, not pictures"
    } else if begins(&["ScoreSde", "KarrasVe", "IPNDM", "DDPMWuerstchen", "CosineDPM"]) {
        "its networks are told a continuous time of its own in the place of a timestep"
    } else if begins(&["CogVideoX"]) {
        "its signal-to-noise ratios are shifted for video"
    } else {
        let taken: Vec<&str> = CLASSES.keys().map(String::as_str).collect();
        return format!("which is not known here{}; supported: {}", nearest(class, &taken), taken.join(", "));
    };
    format!("which is not supported: {reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A class with its own defaults is read, and every meaning is one of its fields or looked at by name.
    #[test]
    fn the_table_of_classes_reads_and_each_class_stands_for_itself() {
        assert_eq!(CLASSES.len(), 25);
        for class in CLASSES.keys() {
            let read = Scheduler::from_value(serde_json::json!({ "_class_name": class }));
            assert!(read.is_ok(), "{class}: {read:?}");
        }
    }
}
