//! The rules of every target, as rules.toml has them, and what each condition means for a node.

use super::Target;
use super::facts::{Facts, Shape};
use candle_onnx::onnx::NodeProto;
use candle_onnx::onnx::tensor_proto::DataType;
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::LazyLock;

/// What one target takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rules {
    pub about: String,
    pub note: String,
    source: String,
    #[serde(default)]
    pub static_shapes: bool,
    /// Whether an input that a node leaves out counts as one of unknown shape.
    #[serde(default)]
    pub omitted_inputs: bool,
    #[serde(default = "no_limit")]
    pub max_rank: usize,
    #[serde(default)]
    pub refused_types: Vec<String>,
    pub dialect: String,
    pub precision: String,
    takes: Vec<Takes>,
    #[serde(default)]
    refuses: Vec<Refuses>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Takes {
    source: String,
    operators: String,
    #[serde(default)]
    pub only_if: Vec<Condition>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Refuses {
    source: String,
    operators: String,
    remedy: String,
}

/// What has to hold of a node; rules.toml explains each.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Condition {
    Constant(Vec<usize>),
    Rank(usize, Vec<usize>),
    Type(usize, Vec<String>),
    Attribute(String, Setting, Vec<Setting>),
    LastAxis,
    Known(usize, usize),
    NonNegative(usize),
    EvenSplit,
    ConstantUnlessInt32(usize),
    ConstantUnless(usize, String, Setting),
}

/// The value of an attribute.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub(super) enum Setting {
    Integer(i64),
    Word(String),
}

#[derive(Deserialize)]
struct Table {
    sources: HashMap<String, String>,
    #[serde(flatten)]
    targets: HashMap<Target, Rules>,
}

static TABLE: LazyLock<Table> =
    LazyLock::new(|| toml::from_str(include_str!("rules.toml")).expect("a test reads the table that is built in"));

fn no_limit() -> usize {
    usize::MAX
}

/// The rules of a target.
pub(super) fn of(target: Target) -> &'static Rules {
    TABLE.targets.get(&target).expect("a test finds every target in the table")
}

impl Rules {
    /// The entry that lists an operator, `domain:Name` or a plain name.
    pub fn takes(&self, operator: &str) -> Option<&Takes> {
        self.takes.iter().find(|entry| lists(&entry.operators, operator))
    }

    /// What to do about an operator that no entry lists, and where that is known from.
    pub fn refuses(&self, operator: &str) -> (Option<&str>, &str) {
        let entry = self.refuses.iter().find(|entry| lists(&entry.operators, operator));
        let source = entry.map_or(&self.source, |entry| &entry.source);
        (entry.map(|entry| entry.remedy.as_str()), source_text(source))
    }

    /// Where the limits of the whole target are known from.
    pub fn source(&self) -> &str {
        source_text(&self.source)
    }
}

impl Takes {
    pub fn source(&self) -> &str {
        source_text(&self.source)
    }
}

fn lists(operators: &str, operator: &str) -> bool {
    operators.split_whitespace().any(|listed| listed == operator)
}

fn source_text(source: &str) -> &'static str {
    TABLE.sources.get(source).expect("a test finds every source in the table")
}

impl Condition {
    /// Why the condition does not hold; `None` where it does, or where too little is known to say.
    pub fn broken(&self, node: &NodeProto, facts: &Facts) -> Option<String> {
        let input = |i: usize| node.input.get(i).filter(|name| !name.is_empty());
        let shape = |i: usize| input(i).and_then(|name| facts.shape(name));
        let kind = |i: usize| input(i).and_then(|name| facts.kind(name));
        match self {
            Condition::Constant(inputs) => {
                let variable = inputs.iter().find(|i| input(**i).is_some_and(|name| !facts.is_constant(name)))?;
                Some(format!("input {variable} must be constant"))
            }
            Condition::Rank(i, ranks) => {
                let rank = shape(*i)?.len();
                (!ranks.contains(&rank)).then(|| format!("input {i} has rank {rank}, expected {}", either(ranks)))
            }
            Condition::Type(i, types) => {
                let found = type_name(kind(*i)?);
                (!types.contains(&found)).then(|| format!("input {i} is {found}, expected {}", either(types)))
            }
            Condition::Attribute(name, default, allowed) => {
                let found = setting(node, name).unwrap_or_else(|| default.clone());
                (!allowed.contains(&found)).then(|| format!("{name} is {found}, expected {}", either(allowed)))
            }
            Condition::LastAxis => {
                let rank = shape(0)?.len() as i64;
                let Some(Setting::Integer(axis)) = setting(node, "axis") else { return None };
                (axis != -1 && axis != rank - 1).then(|| format!("axis is {axis}, expected the last one, {}", rank - 1))
            }
            Condition::Known(i, first) => {
                let dims: &Shape = shape(*i)?;
                let unknown = dims.iter().skip(*first).any(Option::is_none);
                unknown.then(|| format!("input {i} must have static dimensions from number {first} on"))
            }
            Condition::NonNegative(i) => {
                let numbers = facts.integers(input(*i)?)?;
                let negative = numbers.iter().find(|n| **n < 0)?;
                Some(format!("input {i} holds {negative}, expected no negative numbers"))
            }
            Condition::EvenSplit => {
                let lengths = facts.integers(input(1)?)?;
                let uneven = lengths.windows(2).any(|pair| pair[0] != pair[1]);
                uneven.then(|| format!("the parts have lengths {lengths:?}, expected equal ones"))
            }
            Condition::ConstantUnlessInt32(i) => {
                let name = input(*i)?;
                let found = type_name(kind(*i)?);
                let broken = found != "int32" && !facts.is_constant(name);
                broken.then(|| format!("input {i} is {found} and not constant, expected int32 or a constant"))
            }
            Condition::ConstantUnless(i, name, value) => {
                let variable = !facts.is_constant(input(*i)?) && setting(node, name).as_ref() != Some(value);
                variable.then(|| format!("input {i} must be constant, or {name} {value}"))
            }
        }
    }
}

fn setting(node: &NodeProto, name: &str) -> Option<Setting> {
    let attribute = node.attribute.iter().find(|attribute| attribute.name == name)?;
    Some(match attribute.s.as_slice() {
        [] => Setting::Integer(attribute.i),
        word => Setting::Word(String::from_utf8_lossy(word).into_owned()),
    })
}

/// The name of an element type, as ONNX writes it: `float`, `float16`, `int64`.
pub(super) fn type_name(kind: i32) -> String {
    DataType::try_from(kind).map_or_else(|_| format!("type {kind}"), |kind| kind.as_str_name().to_lowercase())
}

fn either<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(" or ")
}

impl std::fmt::Display for Setting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Setting::Integer(value) => value.fmt(f),
            Setting::Word(value) => value.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_table_names_every_target_and_source_and_lists_each_operator_once() {
        let mut used = HashSet::new();
        for target in Target::ALL {
            let rules = of(target);
            let takes = rules.takes.iter().map(|entry| (&entry.source, &entry.operators));
            let refuses = rules.refuses.iter().map(|entry| (&entry.source, &entry.operators));
            let mut operators = HashSet::new();
            used.insert(rules.source.as_str());
            for (source, listed) in takes.chain(refuses) {
                assert!(!source_text(source).is_empty());
                used.insert(source);
                for operator in listed.split_whitespace() {
                    assert!(operators.insert(operator), "{target} lists {operator} twice");
                }
            }
        }
        assert_eq!(TABLE.targets.len(), Target::ALL.len());
        assert_eq!(used.len(), TABLE.sources.len(), "a source is listed and not used");
    }
}
