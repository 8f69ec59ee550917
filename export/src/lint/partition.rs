//! How many pieces the nodes that an accelerator takes fall into. This is the way of ONNX Runtime's own
//! `CreateSupportedPartitionNodeGroups`, as its usability checker has it too: nodes are visited as their inputs become
//! ready, a group grows until only nodes that are not taken are left, and these close it.

use candle_onnx::onnx::{GraphProto, NodeProto};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

/// Groups of nodes, by their places in the graph, each of which would run on the accelerator in one go. What is not
/// there are the nodes of constants.
pub(super) fn partitions(nodes: &[&NodeProto], is_there: &[bool], taken: &[bool]) -> Vec<Vec<usize>> {
    let (mut waits_for, consumers) = edges(nodes, is_there);
    let mut ready: VecDeque<usize> = (0..nodes.len()).filter(|i| is_there[*i] && waits_for[*i] == 0).collect();
    let mut after_this_group = VecDeque::new();
    let (mut groups, mut group, mut border) = (Vec::new(), Vec::new(), HashSet::<usize>::new());
    loop {
        let Some(i) = ready.pop_front() else {
            if !group.is_empty() {
                groups.push(std::mem::take(&mut group));
                border.clear();
            }
            if after_this_group.is_empty() {
                return groups;
            }
            std::mem::swap(&mut ready, &mut after_this_group);
            continue;
        };
        if !taken[i] && border.contains(&i) {
            // It reads what the open group gives, so it can only run when the group is closed.
            after_this_group.push_back(i);
            continue;
        }
        if taken[i] {
            group.push(i);
            border.remove(&i);
            border.extend(&consumers[i]);
        }
        for consumer in &consumers[i] {
            waits_for[*consumer] -= 1;
            if waits_for[*consumer] == 0 {
                ready.push_back(*consumer);
            }
        }
    }
}

/// How many nodes each one waits for, and which wait for it. A graph inside a node reads for that node.
fn edges(nodes: &[&NodeProto], is_there: &[bool]) -> (Vec<usize>, Vec<BTreeSet<usize>>) {
    let mut producers: HashMap<&str, usize> = HashMap::new();
    let mut waits_for = vec![0; nodes.len()];
    let mut consumers = vec![BTreeSet::new(); nodes.len()];
    for (i, node) in nodes.iter().enumerate() {
        if !is_there[i] {
            continue;
        }
        let inner = node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()).flat_map(reads);
        for name in node.input.iter().map(String::as_str).chain(inner) {
            if let Some(producer) = producers.get(name)
                && consumers[*producer].insert(i)
            {
                waits_for[i] += 1;
            }
        }
        producers.extend(node.output.iter().filter(|name| !name.is_empty()).map(|name| (name.as_str(), i)));
    }
    (waits_for, consumers)
}

/// All that the nodes of an inner graph read. What it defines itself stands for nothing outside, because ONNX wants
/// names to be unique.
fn reads(graph: &GraphProto) -> Vec<&str> {
    let mut names = Vec::new();
    for node in &graph.node {
        names.extend(node.input.iter().map(String::as_str));
        names.extend(node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()).flat_map(reads));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A graph from lines `name: inputs`, where a name in capitals is taken; the groups as their names.
    fn groups(lines: &[&str]) -> Vec<String> {
        let node = |line: &&str| {
            let (name, inputs) = line.split_once(':').unwrap();
            let input = inputs.split_whitespace().map(String::from).collect();
            NodeProto { name: name.into(), input, output: vec![name.into()], ..Default::default() }
        };
        let nodes: Vec<NodeProto> = lines.iter().map(node).collect();
        let nodes: Vec<&NodeProto> = nodes.iter().collect();
        let taken: Vec<bool> = nodes.iter().map(|node| node.name.chars().all(char::is_uppercase)).collect();
        let names = |group: Vec<usize>| group.into_iter().map(|i| nodes[i].name.as_str()).collect();
        partitions(&nodes, &vec![true; nodes.len()], &taken).into_iter().map(names).collect()
    }

    #[test]
    fn a_node_that_is_not_taken_splits_a_chain() {
        assert_eq!(groups(&["A: x", "B: A", "C: B"]), ["ABC"]);
        assert_eq!(groups(&["A: x", "b: A", "C: b"]), ["A", "C"]);
        assert_eq!(groups(&["a: x", "B: a", "C: B", "d: C"]), ["BC"]);
        assert_eq!(groups(&["a: x", "b: a"]), [""; 0]);
    }

    #[test]
    fn a_branch_beside_the_other_one_joins_the_group_that_is_open() {
        // b does not wait for A, so that C and A run together after it.
        assert_eq!(groups(&["A: x", "b: x", "C: A b"]), ["AC"]);
        // b waits for A, and C for b: two groups, and D beside b belongs to the first.
        assert_eq!(groups(&["A: x", "b: A", "D: A", "C: b D"]), ["AD", "C"]);
    }
}
