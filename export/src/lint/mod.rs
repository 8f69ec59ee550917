//! Which nodes of an ONNX file an accelerator takes, into how many pieces the graph falls, and why a node is refused.
//! Any file will do, not only those of this crate. What is known about accelerators is in rules.toml and nowhere else.
//!
//! For NNAPI and CoreML, operators, shapes, ranks and partitions are judged as ONNX Runtime's own
//! `check_onnx_model_mobile_usability` judges them; a test compares. On top of it the conditions are checked that the
//! tool lists as "caveats that have not been checked" ([`Kind::Form`]).

mod facts;
mod folding;
mod functions;
mod partition;
mod report;
mod rules;
mod shapes;
mod units;

pub use report::{Kind, Refusal, Report};

use crate::{Dialect, Error, Precision};
use candle_onnx::onnx::{GraphProto, ModelProto, NodeProto, ValueInfoProto};
use dmd_runtime::printable;
use facts::{Facts, Typed, is_constant};
use functions::{Name, label, written_out};
use prost::Message;
use rules::{Qdq, Rules, Takes};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::Path;
use std::str::FromStr;
use std::{fmt, fs};

/// An accelerator, seen through the software that gives it graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Apple's, by ONNX Runtime's CoreML provider.
    CoreMl,
    /// Android's, by ONNX Runtime's NNAPI provider.
    Nnapi,
    /// Qualcomm's, by the QNN provider.
    Qnn,
    /// CPUs of phones, by ONNX Runtime's XNNPACK provider.
    Xnnpack,
    /// GPUs under Windows, by ONNX Runtime's DirectML provider.
    DirectMl,
    /// GPUs, by ONNX Runtime's WebGPU provider.
    WebGpu,
    /// NVIDIA's, by TensorRT's parser.
    TensorRt,
    /// ONNX Runtime's own kernels.
    Cpu,
}

impl Target {
    /// All of them.
    pub const ALL: [Target; 8] = [
        Target::CoreMl,
        Target::Nnapi,
        Target::Qnn,
        Target::Xnnpack,
        Target::DirectMl,
        Target::WebGpu,
        Target::TensorRt,
        Target::Cpu,
    ];

    /// As it stands on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Target::CoreMl => "coreml",
            Target::Nnapi => "nnapi",
            Target::Qnn => "qnn",
            Target::Xnnpack => "xnnpack",
            Target::DirectMl => "directml",
            Target::WebGpu => "webgpu",
            Target::TensorRt => "tensorrt",
            Target::Cpu => "cpu",
        }
    }

    /// The dialect that suits it.
    pub fn dialect(self) -> Dialect {
        let name = rules::of(self).dialect.as_str();
        Dialect::ALL
            .into_iter()
            .find(|dialect| dialect.name() == name)
            .expect("a test reads every dialect in the table")
    }

    /// The precision that suits it.
    pub fn precision(self) -> Precision {
        let name = rules::of(self).precision.as_str();
        Precision::ALL
            .into_iter()
            .find(|precision| precision.name() == name)
            .expect("a test reads every precision in the table")
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(target) = Target::ALL.into_iter().find(|target| target.name() == text) {
            return Ok(target);
        }
        let likeness = |target: &Target| (strsim::jaro_winkler(&text.to_lowercase(), target.name()) * 1e6) as u64;
        let nearest = Target::ALL.into_iter().max_by_key(likeness).map_or("", Target::name);
        let all: Vec<&str> = Target::ALL.into_iter().map(Target::name).collect();
        Err(format!("no target \"{text}\", did you mean \"{nearest}\"? There are {}", all.join(", ")))
    }
}

/// Judges a model.
///
/// ```
/// use candle_onnx::onnx::{GraphProto, ModelProto, NodeProto};
/// use dmd_export::lint::{Target, lint};
///
/// let node = |name: &str, operator: &str, input: &str| NodeProto {
///     name: name.into(),
///     op_type: operator.into(),
///     input: vec![input.into()],
///     output: vec![name.into()],
///     ..Default::default()
/// };
/// let nodes = vec![node("squash", "Tanh", "x"), node("round", "Round", "squash"), node("clip", "Relu", "round")];
/// let model = ModelProto { graph: Some(GraphProto { node: nodes, ..Default::default() }), ..Default::default() };
///
/// let report = lint(&model, Target::TensorRt);
/// assert!(report.is_whole());
/// let report = lint(&model, Target::WebGpu);
/// assert_eq!((report.taken, report.partitions.as_slice()), (2, &[1, 1][..]));
/// assert_eq!(report.refused[0].reason, "webgpu has no operator Round");
/// ```
pub fn lint(model: &ModelProto, target: Target) -> Report {
    let rules = rules::of(target);
    let mut report = Report {
        target,
        about: &rules.about,
        nodes: 0,
        taken: 0,
        partitions: vec![],
        refused: vec![],
        dialect: target.dialect(),
        precision: target.precision(),
        note: &rules.note,
    };
    if let Some(graph) = &model.graph {
        let functions = model.functions.iter().map(functions::name_of).collect();
        let judge = Judge { target, rules, functions };
        let written = written_out(model);
        let nodes: Vec<(usize, &NodeProto)> = written.iter().map(|placed| (placed.place, &*placed.node)).collect();
        judge.graph(graph, &nodes, &mut Facts::outside(model)).0.write(&mut report);
    }
    report
}

/// Reads any ONNX file. Weights that lie outside it are not looked at.
pub fn read(path: &Path) -> crate::Result<ModelProto> {
    let bytes = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let refuse = |reason: &str| Error::NotOnnx { path: path.into(), reason: reason.into() };
    let model = ModelProto::decode(bytes.as_slice()).map_err(|error| refuse(&error.to_string()))?;
    // Other bytes may pass for a message without fields.
    match &model.graph {
        Some(graph) if !graph.node.is_empty() => Ok(model),
        Some(_) => Err(refuse("its graph has no nodes")),
        None => Err(refuse("there is no graph in it")),
    }
}

/// What becomes of a graph, and of those in its nodes, each of which is cut into pieces by itself.
struct Verdict {
    nodes: usize,
    taken: usize,
    partitions: Vec<usize>,
    refused: Vec<Refusal>,
    inner: Vec<Verdict>,
}

impl Verdict {
    fn write(self, report: &mut Report) {
        report.nodes += self.nodes;
        report.taken += self.taken;
        report.partitions.extend(self.partitions);
        report.refused.extend(self.refused);
        self.inner.into_iter().for_each(|inner| inner.write(report));
    }
}

/// A target, and the names of the file's own functions.
struct Judge<'m> {
    target: Target,
    rules: &'static Rules,
    functions: HashSet<Name<'m>>,
}

impl Judge<'_> {
    /// Judges the nodes of a graph, each with its place; and what is known of the graph's outputs.
    fn graph<'a>(
        &self,
        graph: &'a GraphProto,
        placed: &[(usize, &'a NodeProto)],
        facts: &mut Facts<'a>,
    ) -> (Verdict, Vec<Typed>) {
        let nodes: Vec<&NodeProto> = placed.iter().map(|(_, node)| *node).collect();
        let mut inner = Vec::new();
        let open = facts.read(graph, &nodes, &mut |facts, graph| {
            let (verdict, ends) = self.graph(graph, &graph.node.iter().enumerate().collect::<Vec<_>>(), facts);
            inner.push(verdict);
            ends
        });
        let folded = |node: &NodeProto| node.output.first().is_some_and(|name| facts.is_folded(name));
        let is_there: Vec<bool> = nodes.iter().map(|node| !is_constant(node) && !folded(node)).collect();
        let mut taken = vec![false; nodes.len()];
        let mut refused = Vec::new();
        for (i, refusal) in self.refusals(&nodes, &graph.output, facts).into_iter().enumerate() {
            match refusal {
                _ if !is_there[i] => {}
                None => taken[i] = true,
                Some(refusal) => {
                    refused.push(Refusal { node: printable(&label(nodes[i], placed[i].0)).into_owned(), ..refusal })
                }
            }
        }
        let partitions = partition::partitions(&nodes, &is_there, &taken).iter().map(Vec::len).collect();
        let [n_nodes, taken] = [is_there, taken].map(|all| all.into_iter().filter(|is| *is).count());
        (Verdict { nodes: n_nodes, taken, partitions, refused, inner }, facts.leave(graph, open))
    }

    /// Why each node is refused, those of a unit together; `None` where it is taken.
    fn refusals(&self, nodes: &[&NodeProto], ends: &[ValueInfoProto], facts: &Facts) -> Vec<Option<Refusal>> {
        if self.rules.qdq == Qdq::Nodes {
            return nodes.iter().map(|node| self.refusal(node, facts)).collect();
        }
        let (units, alone) = units::of(nodes, ends, facts, rules::quantised());
        let by_itself = |(node, alone): (&&NodeProto, &bool)| alone.then(|| self.refusal(node, facts)).flatten();
        let mut refusals: Vec<Option<Refusal>> = nodes.iter().zip(&alone).map(by_itself).collect();
        for unit in &units {
            let Some(refusal) = self.refusal_of_unit(&unit.as_one, facts) else { continue };
            for i in &unit.around {
                let operator = operator(nodes[*i]);
                let reason = format!("it goes with {} {}", refusal.operator, refusal.reason);
                // The target may well have the nodes around an operator that it has not.
                let kind = if refusal.kind == Kind::Operator { Kind::Form } else { refusal.kind };
                let source = rules::quantised_source();
                refusals[*i].get_or_insert_with(|| Refusal { operator, kind, reason, source, ..refusal.clone() });
            }
            refusals[unit.node] = Some(refusal);
        }
        refusals
    }

    /// The first rule that an operator in a unit breaks.
    fn refusal_of_unit(&self, node: &NodeProto, facts: &Facts) -> Option<Refusal> {
        let (target, rules) = (self.target, self.rules);
        let in_unit = || match rules.takes_in_unit(&operator(node)) {
            Some(entry) => broken(node, facts, entry),
            None => refuse(node, Kind::Form, format!("{target} has it in floats alone"), None, rules.units_source()),
        };
        let found = self.refusal(node, facts).or_else(in_unit)?;
        Some(Refusal { reason: format!("in integers: {}", found.reason), ..found })
    }

    /// The first rule that a node breaks.
    fn refusal(&self, node: &NodeProto, facts: &Facts) -> Option<Refusal> {
        let (target, rules, operator) = (self.target, self.rules, operator(node));
        if self.functions.contains(&functions::called(node)) {
            let reason = "a function of the file that calls itself, or comes to more nodes than are looked at";
            return refuse(node, Kind::Operator, reason.into(), None, rules.source());
        }
        let Some(entry) = rules.takes(&operator) else {
            let (remedy, source) = rules.refuses(&operator);
            return refuse(node, Kind::Operator, format!("{target} has no operator {operator}"), remedy, source);
        };
        if rules.static_shapes
            && let Some((reason, remedy)) = shape_problem(node, facts, rules)
        {
            return refuse(node, Kind::Shape, reason, Some(remedy), rules.source());
        }
        if let Some(reason) = rank_problem(node, facts, rules) {
            return refuse(node, Kind::Rank, reason, None, rules.source());
        }
        let kinds = node.input.iter().filter_map(|name| facts.kind(name)).map(rules::type_name);
        if let Some(kind) = kinds.into_iter().find(|kind| rules.refused_types.contains(kind)) {
            return refuse(node, Kind::Form, format!("{target} has it, but not for {kind}"), None, rules.source());
        }
        broken(node, facts, entry)
    }
}

/// The first condition of an entry that a node breaks.
fn broken(node: &NodeProto, facts: &Facts, entry: &'static Takes) -> Option<Refusal> {
    let reason = entry.only_if.iter().find_map(|condition| condition.broken(node, facts))?;
    refuse(node, Kind::Form, reason, entry.remedy.as_deref(), entry.source())
}

fn refuse(
    node: &NodeProto,
    kind: Kind,
    reason: String,
    remedy: Option<&'static str>,
    source: &'static str,
) -> Option<Refusal> {
    let reason = printable(&reason).into_owned();
    Some(Refusal { node: String::new(), operator: operator(node), kind, reason, remedy, source })
}

/// The operator of a node, with a domain other than ai.onnx before it.
fn operator(node: &NodeProto) -> String {
    let name = match functions::called(node) {
        ("", name) => name.to_string(),
        (domain, name) => format!("{domain}:{name}"),
    };
    printable(&name).into_owned()
}

const FIX_SHAPES: &str = "fix the dimensions of the inputs: python -m onnxruntime.tools.make_dynamic_shape_fixed";
const STATE_SHAPES: &str = "state the shape in the file: nothing here infers it, as behind GroupNormalization";
const FILL_IN: &str = "give the input as a constant without elements";

fn shape_problem(node: &NodeProto, facts: &Facts, rules: &Rules) -> Option<(String, &'static str)> {
    let problem = |(i, name): (usize, &String)| match name.as_str() {
        "" if rules.omitted_inputs => {
            Some((format!("input {i} is left out, which counts as a dynamic shape"), FILL_IN))
        }
        "" => None,
        name if facts.is_static(name) => None,
        name if facts.shape(name).is_some() => Some((format!("input {i} has a dynamic shape"), FIX_SHAPES)),
        _ => Some((format!("the shape of input {i} is not known"), STATE_SHAPES)),
    };
    node.input.iter().enumerate().find_map(problem)
}

/// The rank of what it reads; of a Transpose it is known from its own attribute.
fn rank_problem(node: &NodeProto, facts: &Facts, rules: &Rules) -> Option<String> {
    let perm = node.attribute.iter().find(|attribute| attribute.name == "perm" && node.op_type == "Transpose");
    let ranks = node.input.iter().filter_map(|name| facts.shape(name)).map(Vec::len);
    let rank = ranks.chain(perm.map(|perm| perm.ints.len())).max()?;
    (rank > rules.max_rank).then(|| format!("it reads a value of rank {rank}, expected {} at most", rules.max_rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_go_by_name_and_a_misspelt_one_is_told_the_nearest() {
        for target in Target::ALL {
            assert_eq!(target.name().parse(), Ok(target));
            assert!(matches!(target.precision(), Precision::Fp32 | Precision::Fp16));
            assert_eq!(target.dialect() == Dialect::Nnapi, target == Target::Nnapi);
            assert_eq!(serde_json::to_value(target).unwrap(), target.name());
        }
        let error = "Core-ML".parse::<Target>().unwrap_err();
        assert!(
            error.starts_with("no target \"Core-ML\", did you mean \"coreml\"? There are coreml, nnapi,"),
            "{error}"
        );
    }
}
