//! One picture by an accelerator, beside the processor's of the same file. Some take a graph, run it without an error, and
//! give rubbish: nothing but the numbers tells.

use super::Engine;
use crate::generator::Scratch;
use crate::noise::{PICTURE_NOISE, Stream};
use crate::placement::Probe;
use crate::{Info, Output};

/// The greatest difference that single precision leaves between two engines.
const MAX_DIFFERENCE: f64 = 1e-3;

/// The step between two values of a u8 file, where pictures are in `[-1, 1]`, and a little for its own rounding.
const ONE_LEVEL: f64 = 1.001 / 127.5;

/// Half precision is computed in, whatever the file's own.
const HALF_DB: f64 = 45.0;

/// Values near the edge of one of 256 steps fall to either side.
const EIGHT_BITS_DB: f64 = 30.0;

/// What the processor makes of fixed noise, pass by pass, and what it was made of.
pub(crate) struct Reference {
    passes: Vec<(Scratch, Vec<f64>)>,
}

impl Reference {
    /// Runs every pass on the processor.
    pub fn of(cpu: &dyn Engine, info: &Info) -> Result<Self, String> {
        let mut scratch = Scratch::new(info).map_err(|error| error.to_string())?;
        let values = info.values();
        for (i, picture) in scratch.noise.chunks_exact_mut(values).enumerate() {
            Stream::new(0, PICTURE_NOISE, i as u64).fill_normal(picture);
        }
        let mut passes = Vec::new();
        for (pass, sigma) in info.sigmas.iter().enumerate() {
            if pass > 0 {
                scratch.refine(0, pass, 0, *sigma, values, info.batch);
            }
            let classes = info.classes.len().max(1);
            scratch.index.iter_mut().enumerate().for_each(|(i, row)| *row = (pass * classes + i % classes) as i64);
            scratch.run(cpu, info)?;
            passes.push((scratch.clone(), scratch.values()));
        }
        Ok(Self { passes })
    }

    /// Runs the same by another engine, pass by pass on what the processor's passes read, so that nothing adds up. The error
    /// is the engine's own.
    pub fn compare(&mut self, engine: &dyn Engine, info: &Info) -> Result<Probe, String> {
        let (mut max_difference, mut squares, mut n) = (0f64, 0f64, 0usize);
        for (scratch, expected) in &mut self.passes {
            scratch.clear_pictures();
            scratch.run(engine, info)?;
            for (found, expected) in scratch.values().iter().zip(expected) {
                // A NaN is as far away as can be; `max` alone would pass over it.
                let difference = (found - *expected).abs();
                let difference = if difference.is_nan() { f64::INFINITY } else { difference };
                (max_difference, squares, n) = (max_difference.max(difference), squares + difference.powi(2), n + 1);
            }
        }
        Ok(Probe { max_difference, psnr_db: 10.0 * (4.0 * n as f64 / squares).log10() })
    }
}

/// Why a picture is not like enough, if it is not.
pub(crate) fn refusal(probe: &Probe, info: &Info, computes_half: bool) -> Option<String> {
    let Probe { max_difference, psnr_db } = *probe;
    if !max_difference.is_finite() {
        return Some("values that are not finite".into());
    }
    let least_db = match info.precision.as_str() {
        "w8a8" => EIGHT_BITS_DB,
        "fp16" => HALF_DB,
        _ if computes_half => HALF_DB,
        _ => {
            let most = if info.output == Output::U8 { ONE_LEVEL } else { MAX_DIFFERENCE };
            let refusal = format!("{max_difference:.1e} from the processor's, at most {most:.1e} is allowed");
            return (max_difference > most).then_some(refusal);
        }
    };
    let refusal = format!("at {psnr_db:.1} dB of the processor's, {least_db} dB at least are expected");
    (psnr_db < least_db).then_some(refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_held_to_what_their_precision_leaves() {
        let probe = |max_difference, psnr_db| Probe { max_difference, psnr_db };
        let check = |precision: &str, output, half, probe: Probe, accepted| {
            let info = Info { precision: precision.into(), output, ..Info::default() };
            assert_eq!(refusal(&probe, &info, half).is_none(), accepted, "{precision}, {half}, {probe:?}");
        };
        check("fp32", Output::F32, false, probe(9e-4, 60.0), true);
        check("fp32", Output::F32, false, probe(2e-3, 60.0), false);
        check("fp32", Output::F32, true, probe(2e-3, 60.0), true);
        check("w8", Output::F32, false, probe(2e-3, 60.0), false);
        check("fp32", Output::U8, false, probe(1.0 / 127.5, 50.0), true);
        check("fp32", Output::U8, false, probe(2.0 / 127.5, 50.0), false);
        check("fp16", Output::F32, false, probe(6e-3, 45.0), true);
        check("fp16", Output::F32, false, probe(515.0, -20.0), false);
        check("w8a8", Output::F32, true, probe(0.06, 30.5), true);
        check("w8a8", Output::F32, false, probe(0.5, 29.9), false);
        check("w8a8", Output::F32, false, probe(f64::INFINITY, f64::NEG_INFINITY), false);
    }
}
