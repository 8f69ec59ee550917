//! What makes the documents of dmd. Nothing that a user of the program needs.

pub mod export;
pub mod plane;
pub mod recipes;
pub mod scaling;

mod table;
