//! What a file or a caller may ask for. Every size is checked here before memory is taken or time is spent.

use crate::{Error, Result};

/// The most values of the pictures that one engine call takes or gives: 512 MiB of f32.
pub(crate) const MAX_PICTURE_VALUES: usize = 1 << 27;

/// The most values of one request, and of anything that a graph computes: 4 GiB of f32.
pub(crate) const MAX_VALUES: usize = 1 << 30;

/// The most products of one pass. Hours on one core; a text-to-image network of today takes a hundredth.
pub(crate) const MAX_PRODUCTS: u128 = 1 << 48;

/// Threads of an engine for each core: more only wait for each other.
pub(crate) const MAX_THREADS_PER_CORE: usize = 4;

/// The number of values of a shape, if it is at most `max`.
pub(crate) fn values(dims: impl IntoIterator<Item = u64>, max: usize) -> Option<usize> {
    // A length of 0 must not hide another one that is too large.
    let dims: Vec<u64> = dims.into_iter().collect();
    let product = dims.iter().try_fold(1u64, |n, dim| n.checked_mul((*dim).max(1)))?;
    let values = if dims.contains(&0) { 0 } else { product };
    usize::try_from(values).ok().filter(|_| usize::try_from(product).is_ok_and(|n| n <= max))
}

/// `n` values, if there is memory for them.
pub(crate) fn zeros<T: Clone + Default>(n: usize) -> Result<Vec<T>> {
    let mut values = room(n)?;
    values.resize(n, T::default());
    Ok(values)
}

/// Makes it `n` values long, if there is memory for them; without an allocation where it was as long before.
pub(crate) fn resize<T: Clone + Default>(values: &mut Vec<T>, n: usize) -> Result<()> {
    let more = n.saturating_sub(values.len());
    values.try_reserve_exact(more).map_err(|_| no_memory::<T>(n))?;
    values.resize(n, T::default());
    Ok(())
}

/// Room for `n` values, not touched yet, if the system would give it.
pub(crate) fn room<T>(n: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(n).map_err(|_| no_memory::<T>(n))?;
    Ok(values)
}

fn no_memory<T>(n: usize) -> Error {
    Error::NoMemory { bytes: (n as u64).saturating_mul(size_of::<T>() as u64) }
}

/// What reading a file may cost, whatever its lengths and offsets say, which may lead to the same bytes many times over.
pub(crate) struct Budget {
    items: u64,
    bytes: u64,
}

impl Budget {
    /// Nodes, names, attributes and small numbers; bytes of text. Tenfold what the largest networks have.
    pub fn of_a_file() -> Self {
        Self { items: 1 << 20, bytes: 1 << 24 }
    }

    pub fn items(&mut self, n: u64) -> Result<(), String> {
        let left = self.items.checked_sub(n);
        self.items = left.ok_or("more than a million nodes, names and numbers")?;
        Ok(())
    }

    pub fn text(&mut self, bytes: u64) -> Result<(), String> {
        let left = self.bytes.checked_sub(bytes);
        self.bytes = left.ok_or("more than 16 MiB of names and text")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_that_overflows_or_hides_behind_a_zero_has_no_size() {
        assert_eq!(values([2, 3, 4], 24), Some(24));
        assert_eq!(values([2, 3, 4], 23), None);
        assert_eq!(values([1 << 32, 1 << 32], usize::MAX), None);
        assert_eq!(values([0, 1 << 40], 1 << 30), None);
        assert_eq!(values([0, 3], 4), Some(0));
    }
}
