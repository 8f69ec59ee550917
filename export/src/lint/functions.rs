//! A file's own functions, written out in the place of their calls, as ONNX Runtime does before it asks a provider. What
//! a call comes to is counted before anything is written: of functions that double at every level, a file of a kilobyte
//! could hold any number of nodes.

use crate::limits::Limit;
use candle_onnx::onnx::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto};
use prost::Message;
use std::borrow::Cow;
use std::collections::HashMap;
use std::mem::take;

/// A node, and its place in the file's graph; the place of the call for one that stands in a function.
pub(super) struct Placed<'a> {
    pub place: usize,
    pub node: Cow<'a, NodeProto>,
}

/// The nodes of a model's graph, functions written out. What is left of the calls are those that call themselves, or
/// come to more than [`Limit`] has.
pub(super) fn written_out(model: &ModelProto) -> Vec<Placed<'_>> {
    let nodes = model.graph.iter().flat_map(|graph| &graph.node).enumerate();
    let functions: HashMap<_, _> = model.functions.iter().map(|function| (name_of(function), function)).collect();
    let mut writer = Writer { sizes: sizes(&functions), functions, n_calls: 0, left: Size::default() };
    let mut written = Vec::new();
    for (place, node) in nodes {
        if writer.calls(node) {
            let mut own = Vec::new();
            writer.node(NodeProto { name: label(node, place), ..node.clone() }, 0, &mut own);
            written.extend(own.into_iter().map(|node| Placed { place, node: Cow::Owned(node) }));
        } else {
            written.push(Placed { place, node: Cow::Borrowed(node) });
        }
    }
    written
}

/// The domain, of which ONNX's own has two names, and the name.
pub(super) type Name<'a> = (&'a str, &'a str);

pub(super) fn name_of(function: &FunctionProto) -> Name<'_> {
    (plain(&function.domain), &function.name)
}

/// The function that a node may call.
pub(super) fn called(node: &NodeProto) -> Name<'_> {
    (plain(&node.domain), &node.op_type)
}

fn plain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

/// The name of a node, or its place.
pub(super) fn label(node: &NodeProto, place: usize) -> String {
    if node.name.is_empty() { format!("#{place}") } else { node.name.clone() }
}

fn graphs(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute.iter().filter_map(|attribute| attribute.g.as_ref())
}

/// What nodes come to with all functions in them written out.
#[derive(Clone, Copy, Default)]
struct Size {
    nodes: u64,
    bytes: u64,
    /// Graphs and functions in one another.
    depth: u64,
    /// Names of values and attributes that stand for those of a call.
    names: u64,
}

impl Size {
    fn plus(self, other: Size) -> Size {
        Size {
            nodes: self.nodes.saturating_add(other.nodes),
            bytes: self.bytes.saturating_add(other.bytes),
            depth: self.depth.max(other.depth),
            names: self.names.saturating_add(other.names),
        }
    }

    /// With what a call gives: at each name there may stand the longest of the caller's.
    fn called_by(self, node: &NodeProto) -> Size {
        let names = node.input.iter().chain(&node.output).map(String::len);
        let attributes = node.attribute.iter().map(Message::encoded_len);
        let longest = names.chain(attributes).max().unwrap_or(0) as u64;
        let bytes = self.bytes.saturating_add(self.names.saturating_mul(longest));
        Size { bytes, depth: self.depth + 1, ..self }
    }

    fn is_dealt_with(self) -> bool {
        Limit::Nodes.allows(self.nodes) && Limit::Bytes.allows(self.bytes) && Limit::Depth.allows(self.depth)
    }
}

/// The sizes of all functions that can be written out, those first that call no other.
fn sizes<'a>(functions: &HashMap<Name<'a>, &'a FunctionProto>) -> HashMap<Name<'a>, Size> {
    let mut sizes = HashMap::new();
    for _ in 0..Limit::Depth.most() {
        let unknown = functions.iter().filter(|(name, _)| !sizes.contains_key(*name));
        let found = unknown.filter_map(|(name, function)| Some((*name, size(&function.node, functions, &sizes)?)));
        let found: Vec<_> = found.filter(|(_, size)| size.is_dealt_with()).collect();
        if found.is_empty() {
            break;
        }
        sizes.extend(found);
    }
    sizes
}

/// What nodes come to; `None` where they call a function of which that is not known.
fn size(nodes: &[NodeProto], functions: &HashMap<Name, &FunctionProto>, known: &HashMap<Name, Size>) -> Option<Size> {
    nodes.iter().try_fold(Size::default(), |all, node| {
        let name = called(node);
        let own = if functions.contains_key(&name) {
            known.get(&name)?.called_by(node)
        } else {
            Size { nodes: 1, ..Size::default() }
        };
        let inner = graphs(node).try_fold(Size::default(), |all, graph| {
            let size = size(&graph.node, functions, known)?;
            Some(all.plus(Size { depth: size.depth + 1, ..size }))
        })?;
        let names = node.input.len() + node.output.len() + node.attribute.len();
        let node = Size { bytes: node.encoded_len() as u64, names: names as u64, ..Size::default() };
        Some(all.plus(node).plus(own).plus(inner))
    })
}

struct Writer<'a> {
    functions: HashMap<Name<'a>, &'a FunctionProto>,
    sizes: HashMap<Name<'a>, Size>,
    n_calls: usize,
    /// What the calls so far have come to.
    left: Size,
}

impl<'a> Writer<'a> {
    /// Whether a node calls a function, itself or in a graph in it.
    fn calls(&self, node: &NodeProto) -> bool {
        self.functions.contains_key(&called(node))
            || graphs(node).any(|graph| graph.node.iter().any(|node| self.calls(node)))
    }

    /// Writes a node that stands `depth` functions deep, or what it calls.
    fn node(&mut self, mut node: NodeProto, depth: usize, to: &mut Vec<NodeProto>) {
        for graph in node.attribute.iter_mut().filter_map(|attribute| attribute.g.as_mut()) {
            for (place, mut node) in take(&mut graph.node).into_iter().enumerate() {
                node.name = label(&node, place);
                self.node(node, depth, &mut graph.node);
            }
        }
        match self.function(&node, depth) {
            Some(function) => self.body(&node, function, depth + 1, to),
            None => to.push(node),
        }
    }

    /// The function that a node calls, if it can be written out.
    fn function(&mut self, node: &NodeProto, depth: usize) -> Option<&'a FunctionProto> {
        let function = self.functions.get(&called(node)).copied()?;
        let size = self.sizes.get(&name_of(function))?;
        // What a function calls has been counted with it.
        if depth == 0 {
            let all = self.left.plus(size.called_by(node));
            if !all.is_dealt_with() {
                return None;
            }
            self.left = all;
        }
        Some(function)
    }

    fn body(&mut self, call: &NodeProto, function: &FunctionProto, depth: usize, to: &mut Vec<NodeProto>) {
        self.n_calls += 1;
        let formal = function.input.iter().chain(&function.output).map(String::as_str);
        let padded = |names: &'_ [String], n: usize| -> Vec<String> {
            names.iter().cloned().chain(std::iter::repeat(String::new())).take(n).collect()
        };
        let actual = [padded(&call.input, function.input.len()), padded(&call.output, function.output.len())].concat();
        let given = |name: &str| call.attribute.iter().any(|attribute| attribute.name == name);
        let defaults = function.attribute_proto.iter().filter(|default| !given(&default.name));
        let names = Renaming {
            prefix: format!("{}/", self.n_calls),
            names: formal.zip(actual).collect(),
            attributes: call.attribute.iter().chain(defaults).collect(),
        };
        for (place, inner) in function.node.iter().enumerate() {
            let mut node = inner.clone();
            names.node(&mut node);
            node.name = format!("{}/{}", shortened(&call.name), label(inner, place));
            self.node(node, depth, to);
        }
    }
}

/// The first characters of a name, where it stands among other words.
pub(super) fn shortened(name: &str) -> String {
    name.chars().take(64).collect()
}

/// What the names of a function stand for where it is called.
struct Renaming<'a> {
    prefix: String,
    names: HashMap<&'a str, String>,
    attributes: Vec<&'a AttributeProto>,
}

impl Renaming<'_> {
    fn name(&self, name: &mut String) {
        match self.names.get(name.as_str()) {
            Some(actual) => name.clone_from(actual),
            None if name.is_empty() => {}
            None => name.insert_str(0, &self.prefix),
        }
    }

    fn node(&self, node: &mut NodeProto) {
        node.input.iter_mut().chain(&mut node.output).for_each(|name| self.name(name));
        node.attribute.retain_mut(|attribute| {
            if attribute.ref_attr_name.is_empty() {
                attribute.g.iter_mut().for_each(|graph| self.graph(graph));
                return true;
            }
            let given = self.attributes.iter().find(|given| given.name == attribute.ref_attr_name);
            given.inspect(|given| *attribute = AttributeProto { name: take(&mut attribute.name), ..(**given).clone() });
            given.is_some()
        });
    }

    fn graph(&self, graph: &mut GraphProto) {
        let infos = graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info);
        infos.for_each(|info| self.name(&mut info.name));
        let sparse = graph.sparse_initializer.iter_mut().filter_map(|sparse| sparse.values.as_mut());
        graph.initializer.iter_mut().chain(sparse).for_each(|tensor| self.name(&mut tensor.name));
        graph.node.iter_mut().for_each(|node| self.node(node));
    }
}
