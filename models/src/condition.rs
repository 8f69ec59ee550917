//! What a network is told besides the sample and its noise level.

use crate::Result;
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;

/// How it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// Class ids, i64 `(B,)`.
    Label,
    /// Features of a prompt's tokens, attended to.
    Text,
    /// A vector `(B, C)`: pooled text, picture sizes, a guidance scale.
    Vector,
    /// A map `(B, C', H, W)` joined to the sample: editing, inpainting, super-resolution.
    Map,
}

/// At most one value for each way. A network that is told nothing gets the empty condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition<V>(BTreeMap<Way, V>);

impl<V> Default for Condition<V> {
    fn default() -> Self {
        Condition(BTreeMap::new())
    }
}

impl<V> Condition<V> {
    /// Nothing.
    pub fn none() -> Self {
        Condition::default()
    }

    /// One way, where there is a value for it.
    pub fn of(way: Way, value: impl Into<Option<V>>) -> Self {
        value.into().map(|value| (way, value)).into_iter().collect()
    }

    /// What is told in a way.
    pub fn get(&self, way: Way) -> Option<&V> {
        self.0.get(&way)
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All ways and what is told in them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Way, &V)> {
        self.0.iter().map(|(way, value)| (*way, value))
    }

    /// The same ways with what `f` makes of their values.
    pub fn try_map<W, E>(
        &self,
        mut f: impl FnMut(&V) -> std::result::Result<W, E>,
    ) -> std::result::Result<Condition<W>, E> {
        self.iter().map(|(way, value)| Ok((way, f(value)?))).collect()
    }
}

impl Condition<Tensor> {
    /// Class ids; nothing where there are none.
    pub fn of_classes<I: Into<i64>>(ids: impl IntoIterator<Item = I>, device: &Device) -> Result<Self> {
        let ids: Vec<i64> = ids.into_iter().map(Into::into).collect();
        let n = ids.len();
        if n == 0 { Ok(Condition::none()) } else { Ok(Condition::of(Way::Label, Tensor::from_vec(ids, n, device)?)) }
    }

    /// The rows of several of the same ways, one after the other.
    pub fn cat(parts: &[Self]) -> Result<Self> {
        let ways = parts.first().into_iter().flat_map(Self::iter);
        ways.map(|(way, _)| {
            let parts: Vec<&Tensor> = parts.iter().filter_map(|part| part.get(way)).collect();
            Ok((way, Tensor::cat(&parts, 0)?))
        })
        .collect()
    }

    /// The same rows, but for those that are `silent`: these are `unconditional`'s, one row `(1, …)` of each way.
    pub fn without(&self, unconditional: &Self, silent: &[bool]) -> Result<Self> {
        let n = silent.len() as u32;
        let picks: Vec<u32> = (0..n).zip(silent).map(|(i, silent)| if *silent { n } else { i }).collect();
        let of_way = |(way, rows): (Way, &Tensor)| {
            let Some(row) = unconditional.get(way) else { return Ok((way, rows.clone())) };
            let picks = Tensor::new(&picks[..], rows.device())?;
            Ok((way, Tensor::cat(&[rows, row], 0)?.index_select(&picks, 0)?))
        };
        self.iter().map(of_way).collect()
    }

    /// One row `(1, …)` of each way as a batch of `n`.
    pub fn repeated(&self, n: usize) -> Result<Self> {
        self.try_map(|row| Ok(row.broadcast_as([&[n], &row.dims()[1..]].concat())?.contiguous()?))
    }
}

impl<V> FromIterator<(Way, V)> for Condition<V> {
    fn from_iter<I: IntoIterator<Item = (Way, V)>>(ways: I) -> Self {
        Condition(ways.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_condition_and_an_empty_one_are_the_same() {
        assert_eq!(Condition::<u8>::of(Way::Text, None), Condition::none());
        assert!(Condition::of_classes(Vec::<i64>::new(), &Device::Cpu).unwrap().is_empty());
        assert_eq!(Condition::of(Way::Text, 3).get(Way::Label), None);
    }

    #[test]
    fn a_map_keeps_the_ways_and_stops_at_an_error() {
        let both: Condition<u8> = [(Way::Map, 2), (Way::Label, 1)].into_iter().collect();
        let doubled = both.try_map(|value| Ok::<_, ()>(2 * value)).unwrap();
        assert_eq!(doubled.iter().collect::<Vec<_>>(), [(Way::Label, &2), (Way::Map, &4)]);
        assert_eq!(both.try_map(|value| if *value == 2 { Err("map") } else { Ok(()) }), Err("map"));
    }

    #[test]
    fn silent_rows_are_told_nothing() {
        let of = |ids: &[i64], vectors: &[[f32; 2]]| -> Condition<Tensor> {
            let ids = Tensor::new(ids, &Device::Cpu).unwrap();
            let vectors = Tensor::from_slice(vectors.as_flattened(), (vectors.len(), 2), &Device::Cpu).unwrap();
            [(Way::Label, ids), (Way::Vector, vectors)].into_iter().collect()
        };
        let told = of(&[1, 2, 3], &[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]);
        let told = told.without(&of(&[7], &[[0.0, -1.0]]), &[false, true, false]).unwrap();
        assert_eq!(told.get(Way::Label).unwrap().to_vec1::<i64>().unwrap(), [1, 7, 3]);
        let vectors = told.get(Way::Vector).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(vectors, [[1.0, 1.0], [0.0, -1.0], [3.0, 3.0]]);
    }

    #[test]
    fn a_row_is_repeated_for_every_sample() {
        let row: Condition<Tensor> = [
            (Way::Label, Tensor::new(&[7i64], &Device::Cpu).unwrap()),
            (Way::Vector, Tensor::new(&[[1f32, 2.0]], &Device::Cpu).unwrap()),
        ]
        .into_iter()
        .collect();
        let rows = row.repeated(3).unwrap();
        assert_eq!(rows.get(Way::Label).unwrap().to_vec1::<i64>().unwrap(), [7, 7, 7]);
        assert_eq!(rows.get(Way::Vector).unwrap().to_vec2::<f32>().unwrap(), [[1.0, 2.0]; 3]);
    }
}
