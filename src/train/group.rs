//! The processes that train one model together: between what a process adds up and what its optimiser makes of it stands
//! the sum over all of them.

use crate::optim::Gradients;
use anyhow::Result;

/// This process among those that train together.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
}

impl Group {
    /// One process by itself.
    pub fn alone() -> Self {
        Group { rank: 0, size: 1 }
    }

    /// The gradients of all, in every process. One by itself has them.
    pub fn sum(&self, gradients: Gradients) -> Result<Gradients> {
        debug_assert_eq!(self.size, 1);
        Ok(gradients)
    }
}
