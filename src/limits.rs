//! Numbers that a slip of the finger makes huge are refused before memory is taken or time spent.

use crate::cli::WrongUsage;
use anyhow::Result;

/// Pictures of one call.
pub const PICTURES: u64 = 1_000_000;
/// Timed passes.
pub const RUNS: u64 = 1_000_000;
/// Steps of a sampler.
pub const SAMPLER_STEPS: u64 = 10_000;
/// Pixels of a picture, in one direction.
pub const SIDE: u64 = 1 << 14;
/// Values that a call may hold: 16 GiB of floats.
const VALUES: u64 = 4 << 30;

/// A count from 1 to `most`.
pub fn count(option: &str, n: u64, most: u64) -> Result<()> {
    if (1..=most).contains(&n) { Ok(()) } else { refuse(format!("{option} is {n}, expected 1 to {most}")) }
}

/// So many pictures of this shape.
pub fn pictures(option: &str, n: u64, shape: [usize; 3]) -> Result<()> {
    count(option, n, PICTURES)?;
    let values = shape.iter().try_fold(n, |values, side| values.checked_mul(*side as u64));
    match values.is_some_and(|values| values <= VALUES) {
        true => Ok(()),
        false => refuse(format!(
            "{option} is {n}, which is too many pictures of {shape:?}: at most {VALUES} values fit in one call"
        )),
    }
}

fn refuse(text: String) -> Result<()> {
    Err(WrongUsage(text).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_numbers_are_refused_with_what_is_allowed() {
        let text = |result: Result<()>| result.unwrap_err().to_string();
        assert_eq!(text(count("--steps", 0, 9)), "--steps is 0, expected 1 to 9");
        assert_eq!(text(count("--steps", u64::MAX, 9)), "--steps is 18446744073709551615, expected 1 to 9");
        assert!(count("--steps", 9, 9).is_ok() && pictures("-n", 1000, [3, 512, 512]).is_ok());
        assert!(text(pictures("-n", 1_000_000, [3, 512, 512])).contains("too many pictures of [3, 512, 512]"));
        assert!(text(pictures("-n", 2, [usize::MAX, 4, 4])).contains("too many pictures"));
    }
}
