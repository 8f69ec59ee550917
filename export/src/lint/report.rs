//! What a lint finds, for a program as JSON and for a person as a table.

use super::Target;
use crate::{Dialect, Precision};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Which nodes of a file an accelerator takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The accelerator.
    pub target: Target,
    /// What is meant by it.
    pub about: &'static str,
    /// Nodes of the file, those of inner graphs and functions included; constants and what follows from shapes apart.
    pub nodes: usize,
    /// Nodes that the accelerator takes.
    pub taken: usize,
    /// How many nodes each piece has that the accelerator runs in one go; the best is one that holds them all.
    pub partitions: Vec<usize>,
    /// The nodes that run elsewhere, in the order of the file.
    pub refused: Vec<Refusal>,
    /// The dialect that suits the accelerator.
    pub dialect: Dialect,
    /// The precision that suits it.
    pub precision: Precision,
    /// What else to know.
    pub note: &'static str,
}

/// A node that the accelerator does not take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Refusal {
    /// Its name; `#12` for the thirteenth node where it has none.
    pub node: String,
    /// Its operator, with a domain other than ai.onnx before it.
    pub operator: String,
    /// What kind of rule it breaks.
    pub kind: Kind,
    /// The first rule that it breaks.
    pub reason: String,
    /// What to do about it, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<&'static str>,
    /// Where the rule is known from.
    pub source: &'static str,
}

/// Kinds of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The operator is not there.
    Operator,
    /// A value that it reads has no static shape.
    Shape,
    /// A value that it reads has too many dimensions.
    Rank,
    /// The operator is there, but not in this form: an element type, an attribute, an input that is not constant.
    Form,
}

impl Report {
    /// Whether one piece holds every node.
    pub fn is_whole(&self) -> bool {
        self.partitions == [self.nodes]
    }
}

/// The longest list of nodes with the same trouble.
const MAX_NAMES: usize = 3;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = 100.0 * self.taken as f64 / self.nodes.max(1) as f64;
        writeln!(f, "{}: {}", self.target, self.about)?;
        let pieces = match self.partitions.as_slice() {
            [] => "no partition".to_string(),
            [_] => "one partition".to_string(),
            many => format!("{} partitions of {many:?} nodes", many.len()),
        };
        write!(f, "takes {} of {} nodes ({percent:.1} %) in {pieces}", self.taken, self.nodes)?;
        let mut alike: BTreeMap<(&str, &str), Vec<&Refusal>> = BTreeMap::new();
        for refusal in &self.refused {
            alike.entry((&refusal.operator, &refusal.reason)).or_default().push(refusal);
        }
        let width = alike.keys().map(|(operator, _)| operator.len()).max().unwrap_or(0);
        for ((operator, reason), refusals) in alike {
            let names: Vec<&str> = refusals.iter().take(MAX_NAMES).map(|refusal| refusal.node.as_str()).collect();
            let more = if refusals.len() > MAX_NAMES { ", …" } else { "" };
            write!(f, "\n  {:>4} × {operator:width$}  {reason} ({}{more})", refusals.len(), names.join(", "))?;
            if let Some(remedy) = refusals[0].remedy {
                write!(f, "\n         {:width$}  remedy: {remedy}", "")?;
            }
        }
        let sources: BTreeSet<&str> = self.refused.iter().map(|refusal| refusal.source).collect();
        for source in sources {
            write!(f, "\nsource: {source}")?;
        }
        write!(f, "\nsuited by: dialect {}, {}\nnote: {}", self.dialect.name(), self.precision, self.note)
    }
}
