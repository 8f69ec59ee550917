//! What a person looks at after the work: self-contained pages, with the numbers beside them as JSON.

pub mod export;
pub mod page;
