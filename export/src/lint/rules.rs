//! The rules of every target, as rules.toml has them, and what each condition means for a node.

use super::Target;
use super::facts::{Facts, Shape};
use super::functions::shortened;
use super::shapes::{attribute, ints};
use super::units::Quantised;
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
    #[serde(default)]
    pub qdq: Qdq,
    takes: Vec<Takes>,
    #[serde(default)]
    units: Vec<Takes>,
    #[serde(default)]
    refuses: Vec<Refuses>,
}

/// How DequantizeLinear and QuantizeLinear reach a target.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum Qdq {
    /// As nodes like all others.
    #[default]
    Nodes,
    /// As parts of [units](super::units).
    Units,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Takes {
    source: String,
    operators: String,
    #[serde(default)]
    pub only_if: Vec<Condition>,
    /// What to do where a condition does not hold.
    pub remedy: Option<String>,
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
    TypeSince(i64, usize, Vec<String>),
    SameType(usize, usize),
    Attribute(String, Setting, Vec<Setting>),
    Unlike(String, Setting),
    OnlyZeros(String),
    LastAxis,
    Known(usize, usize),
    NonNegative(usize),
    Zero(usize),
    OneNumber(usize),
    FromNode(usize),
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
    qdq: Quantised,
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

/// Which operators make a unit with DequantizeLinear and QuantizeLinear.
pub(super) fn quantised() -> &'static Quantised {
    &TABLE.qdq
}

/// Where they are known from.
pub(super) fn quantised_source() -> &'static str {
    source_text(&TABLE.qdq.source)
}

impl Rules {
    /// The entry that lists an operator, `domain:Name` or a plain name.
    pub fn takes(&self, operator: &str) -> Option<&Takes> {
        self.takes.iter().find(|entry| lists(&entry.operators, operator))
    }

    /// What has to hold of an operator in a unit, on top of the entry that lists it; `None` where it is not taken so.
    pub fn takes_in_unit(&self, operator: &str) -> Option<&Takes> {
        match self.units.is_empty() {
            true => self.takes(operator),
            false => self.units.iter().find(|entry| lists(&entry.operators, operator)),
        }
    }

    /// What to do about an operator that no entry lists, and where that is known from.
    pub fn refuses(&self, operator: &str) -> (Option<&str>, &str) {
        let entry = self.refuses.iter().find(|entry| lists(&entry.operators, operator));
        let source = entry.map_or(&self.source, |entry| &entry.source);
        (entry.map(|entry| entry.remedy.as_str()), source_text(source))
    }

    /// Where it is known from which operators it takes in a unit.
    pub fn units_source(&self) -> &str {
        self.units.first().map_or(self.source(), Takes::source)
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

pub(super) fn lists(operators: &str, operator: &str) -> bool {
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
                let origin = input(*variable).and_then(|name| facts.producer(name));
                let origin =
                    origin.map_or(String::new(), |node| format!(", and comes from {}", shortened(&node.op_type)));
                Some(format!("input {variable} must be constant{origin}"))
            }
            Condition::Rank(i, ranks) => {
                let rank = shape(*i)?.len();
                (!ranks.contains(&rank)).then(|| format!("input {i} has rank {rank}, expected {}", either(ranks)))
            }
            Condition::Type(i, types) => {
                let found = type_name(kind(*i)?);
                (!types.contains(&found)).then(|| format!("input {i} is {found}, expected {}", either(types)))
            }
            Condition::TypeSince(opset, ..) if facts.opset() < *opset => None,
            Condition::TypeSince(opset, i, types) => {
                let found = type_name(kind(*i)?);
                let refused = !types.contains(&found);
                refused.then(|| format!("input {i} is {found}, expected {} from opset {opset} on", either(types)))
            }
            Condition::SameType(i, j) => {
                let (a, b) = (type_name(kind(*i)?), type_name(kind(*j)?));
                (a != b).then(|| format!("inputs {i} and {j} are {a} and {b}, expected one type"))
            }
            Condition::Unlike(name, refused) => {
                let found = setting(node, name)?;
                (found == *refused).then(|| format!("{name} is {refused}, expected another"))
            }
            Condition::Attribute(name, default, allowed) => {
                let found = setting(node, name).unwrap_or_else(|| default.clone());
                (!allowed.contains(&found)).then(|| format!("{name} is {found}, expected {}", either(allowed)))
            }
            Condition::OnlyZeros(name) => {
                let numbers = ints(node, name)?;
                numbers.iter().any(|n| *n != 0).then(|| format!("{name} is {}, expected none", few(&numbers)))
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
            Condition::Zero(i) => {
                let numbers = facts.integers(input(*i)?)?;
                numbers.iter().any(|n| *n != 0).then(|| format!("input {i} must be 0 throughout"))
            }
            Condition::OneNumber(i) => {
                let n = shape(*i)?.iter().try_fold(1u64, |n, dim| n.checked_mul((*dim)?))?;
                (n != 1).then(|| format!("input {i} holds {n} numbers, expected one"))
            }
            Condition::FromNode(i) => {
                let outside = facts.producer(input(*i)?).is_none();
                outside.then(|| format!("input {i} is the graph's own, expected the output of a node"))
            }
            Condition::EvenSplit => {
                let lengths = facts.integers(input(1)?)?;
                let uneven = lengths.windows(2).any(|pair| pair[0] != pair[1]);
                uneven.then(|| format!("the parts have lengths {}, expected equal ones", few(&lengths)))
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

/// The first of many numbers.
fn few(numbers: &[i64]) -> String {
    const FEW: usize = 16;
    match numbers {
        [first @ .., _] if first.len() >= FEW => format!("{:?} and {} more", &numbers[..FEW], numbers.len() - FEW),
        all => format!("{all:?}"),
    }
}

fn setting(node: &NodeProto, name: &str) -> Option<Setting> {
    let attribute = attribute(node, name)?;
    Some(match attribute.s.as_slice() {
        [] => Setting::Integer(attribute.i),
        word => Setting::Word(shortened(&String::from_utf8_lossy(word))),
    })
}

/// The name of an element type, as ONNX writes it: `float`, `float16`, `int64`.
pub(super) fn type_name(kind: i32) -> String {
    match (DataType::try_from(kind), kind) {
        (Ok(kind), _) => kind.as_str_name().to_lowercase(),
        // Later than the schema that candle-onnx has.
        (_, 21) => "uint4".into(),
        (_, 22) => "int4".into(),
        (_, 23) => "float4e2m1".into(),
        _ => format!("type {kind}"),
    }
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
        let mut used = HashSet::from([quantised().source.as_str()]);
        for target in Target::ALL {
            let rules = of(target);
            let takes = rules.takes.iter().map(|entry| (&entry.source, &entry.operators));
            let refuses = rules.refuses.iter().map(|entry| (&entry.source, &entry.operators));
            for entry in &rules.units {
                used.insert(&entry.source);
                assert_eq!(rules.qdq, Qdq::Units);
                assert!(entry.operators.split_whitespace().all(|operator| rules.takes(operator).is_some()));
            }
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
