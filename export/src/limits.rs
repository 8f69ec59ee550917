//! How large things get that others ask for: files under lint, settings of an export. Each size is held to these before
//! memory is taken or time is spent for it.

/// What nothing that is real exceeds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    /// Dimensions of a value.
    Rank,
    /// The length of a dimension: sums and products of two of these stay within 64 bits.
    Length,
    /// Numbers of a constant that are looked at: axes and pads of a value, lengths of its parts.
    Numbers,
    /// Nodes that stand in the place of a graph's calls of functions, and their bytes.
    Nodes,
    Bytes,
    /// Graphs in nodes, and functions in functions.
    Depth,
    /// Numbers that a run takes or gives, as the runtime has it.
    Values,
}

impl Limit {
    /// The most.
    pub const fn most(self) -> u64 {
        match self {
            Limit::Rank => 64,
            Limit::Length => 1 << 31,
            Limit::Numbers => 1 << 12,
            Limit::Nodes => 1 << 17,
            Limit::Bytes => 1 << 25,
            Limit::Depth => 48,
            Limit::Values => 1 << 30,
        }
    }

    /// Whether a size is one that is dealt with.
    pub fn allows(self, size: impl TryInto<u64>) -> bool {
        size.try_into().is_ok_and(|size| size <= self.most())
    }
}
