//! `dmd config show`: the settings of a distillation, whole, and what they mean.

use super::distill::settings;
use crate::cli::SettingsArgs;
use crate::config;
use crate::output::result;
use anyhow::Result;
use serde_json::Value;

/// Prints them as TOML.
pub fn run(args: &SettingsArgs) -> Result<Value> {
    let config = settings(args)?;
    result(config::explained(&config)?.trim_end())?;
    Ok(serde_json::to_value(&config)?)
}
