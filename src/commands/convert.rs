//! `dmd convert`: a whole model in one file to a model folder, and back.

use super::{check_free, make_parent, without_effect};
use crate::cli::ConvertArgs;
use crate::output::{say, warn};
use anyhow::{Result, bail, ensure};
use dmd_models::ModelFolder;
use dmd_models::single_file::{Options, pack, unpack};
use serde_json::{Value, json};

/// Converts what is given to what it is not.
pub fn run(args: &ConvertArgs) -> Result<Value> {
    let (from, to) = (args.model.display(), args.out.display());
    if args.model.is_dir() {
        let why = "it is for files";
        without_effect("--like", args.like.is_some(), why)?;
        without_effect("--prediction", args.prediction.is_some(), why)?;
        if args.out.extension().is_none_or(|extension| extension != "safetensors") {
            bail!("{from} is a folder, so {to} will be a file: expected a name that ends in .safetensors");
        }
        check_free(&args.out, args.force)?;
        make_parent(&args.out)?;
        let kind = pack(&args.model, &args.out)?;
        say(&format!("{to}: {} in one file", kind.name()));
        return Ok(json!({ "out": args.out, "family": kind.name() }));
    }
    check_free(&args.out, args.force)?;
    ensure!(
        !args.out.exists() || ModelFolder::is_at(&args.out),
        "{to}: is no model folder, so that --force does not replace it"
    );
    make_parent(&args.out)?;
    let options = Options { like: args.like.as_deref(), prediction: args.prediction.as_deref() };
    let made = unpack(&args.model, options, &args.out)?;
    made.said.iter().for_each(|said| warn(&format!("{from}: {said}")));
    say(&format!("{to}: {}, whose network predicts {}", made.kind.name(), made.prediction));
    Ok(json!({ "out": args.out, "family": made.kind.name(), "prediction": made.prediction }))
}
