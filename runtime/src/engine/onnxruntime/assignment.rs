//! Which node of a session runs where. From 1.31 on the library tells; older ones tell it wrongly of plug-ins with kernels of
//! their own, so that there the profile of a run is believed where it knows a node.

use std::ffi::{CStr, c_char};
use std::fs;
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use ort::AsPointer;
use ort::ep::{self, ExecutionProvider};
use ort::session::Session;
use serde::Deserialize;

use crate::PlacedNode;
use crate::printable::printable_lines;

/// The first version whose word is enough.
pub(super) const TOLD_FROM: u32 = 31;

/// What the library says; the session must have been asked to note it.
pub(super) fn told(session: &Session) -> ort::Result<Vec<PlacedNode>> {
    let api = ort::api();
    let (mut parts, mut n_parts) = (ptr::null(), 0);
    // SAFETY: the session is alive, and so is what it hands out, which stays its own; it has as many as it says.
    unsafe {
        ort::Error::result_from_status((api.Session_GetEpGraphAssignmentInfo)(
            session.ptr(),
            &mut parts,
            &mut n_parts,
        ))?;
        let mut placed = Vec::new();
        for at in 0..n_parts {
            let part = *parts.add(at);
            let provider = text(|out| (api.EpAssignedSubgraph_GetEpName)(part, out))?;
            let (mut nodes, mut n_nodes) = (ptr::null(), 0);
            ort::Error::result_from_status((api.EpAssignedSubgraph_GetNodes)(part, &mut nodes, &mut n_nodes))?;
            for at in 0..n_nodes {
                let node = *nodes.add(at);
                placed.push(PlacedNode {
                    name: text(|out| (api.EpAssignedNode_GetName)(node, out))?,
                    operator: text(|out| (api.EpAssignedNode_GetOperatorType)(node, out))?,
                    provider: provider.clone(),
                });
            }
        }
        Ok(placed)
    }
}

/// A text that the library lends.
fn text(get: impl FnOnce(*mut *const c_char) -> ort::sys::OrtStatusPtr) -> ort::Result<String> {
    let mut text = ptr::null();
    // SAFETY: a status of the library's, or null; it is given back once.
    unsafe { ort::Error::result_from_status(get(&mut text)) }?;
    if text.is_null() {
        return Ok(String::new());
    }
    // SAFETY: the library gives C strings, which outlive this call.
    Ok(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// What a run showed, where the library's word is not enough: nodes that ran are where they ran. Of a provider that compiles,
/// the run has parts with names of their own, and the library's word is right.
pub(super) fn corrected(told: Vec<PlacedNode>, profile: &[u8]) -> Result<Vec<PlacedNode>, String> {
    let ran = ran(profile)?;
    let compiles = |provider: &str| {
        let mut own = told.iter().filter(|node| node.provider == provider).peekable();
        provider != ep::CPU::NAME
            && own.peek().is_some()
            && !own.any(|node| ran.iter().any(|run| run.name == node.name))
    };
    let (compiled, others): (Vec<_>, Vec<_>) = ran.iter().cloned().partition(|node| compiles(&node.provider));
    let in_parts = |node: &&PlacedNode| compiled.iter().any(|part| part.provider == node.provider);
    Ok(told.iter().filter(in_parts).cloned().chain(others).collect())
}

/// The nodes of a profile.
fn ran(profile: &[u8]) -> Result<Vec<PlacedNode>, String> {
    #[derive(Deserialize)]
    struct Event {
        name: String,
        #[serde(default)]
        args: Arguments,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Arguments {
        op_name: Option<String>,
        provider: Option<String>,
    }
    let events: Vec<Event> =
        serde_json::from_slice(profile).map_err(|error| format!("the profile of a run: {error}"))?;
    let mut nodes: Vec<PlacedNode> = Vec::new();
    for Event { name, args } in events {
        let (Some(name), Some(operator), Some(provider)) =
            (name.strip_suffix("_kernel_time"), args.op_name, args.provider)
        else {
            continue;
        };
        if !nodes.iter().any(|node| node.name == name) {
            nodes.push(PlacedNode { name: name.into(), operator, provider });
        }
    }
    Ok(nodes)
}

/// A folder of our own for the profile of a run, which goes with it.
pub(super) struct ProfileFolder(PathBuf);

impl ProfileFolder {
    /// Nobody else's folder: making one fails where there is something already.
    pub fn new() -> std::io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(format!("dmd-profile-{process}-{number}"));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// What the library is told to begin the file's name with.
    pub fn prefix(&self) -> PathBuf {
        self.0.join("run")
    }
}

impl Drop for ProfileFolder {
    fn drop(&mut self) {
        // What stays behind is in the system's folder for temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Ends the profile of a session and reads it.
pub(super) fn profile(session: &Session) -> Result<Vec<u8>, String> {
    let path = ended(session).map_err(|error| printable_lines(&error.to_string()))?;
    fs::read(&path).map_err(|error| format!("the profile of a run, {}: {error}", path.display()))
}

/// `ort` asks for `&mut Session`, which is shared by now with the engine that ran it.
fn ended(session: &Session) -> ort::Result<PathBuf> {
    let (api, allocator) = (ort::api(), session.allocator());
    let mut name = ptr::null_mut();
    // SAFETY: the session and the allocator are alive; nothing runs the session now, as it is not handed out yet.
    unsafe {
        let status = (api.SessionEndProfiling)(session.ptr().cast_mut(), allocator.ptr().cast_mut(), &mut name);
        ort::Error::result_from_status(status)?;
        let path = CStr::from_ptr(name).to_string_lossy().into_owned();
        allocator.free(name);
        Ok(PathBuf::from(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, provider: &str) -> PlacedNode {
        PlacedNode { name: name.into(), operator: "Conv".into(), provider: provider.into() }
    }

    #[test]
    fn a_run_overrules_what_an_old_library_tells() {
        let event = |name: &str, provider: &str| {
            format!(
                r#"{{"cat":"Node","name":"{name}","args":{{"op_name":"Conv","provider":"{provider}","node_index":"1"}}}}"#
            )
        };
        let profile = format!(
            r#"[{{"cat":"Session","name":"model_run","args":{{}}}},{},{},{}]"#,
            event("a_kernel_time", "GPU"),
            event("a_kernel_time", "GPU"),
            event("new_kernel_time", ep::CPU::NAME),
        );
        // Kernels of a plug-in: one node is told of as the CPU's, one came by a rewrite.
        let found = corrected(vec![node("a", ep::CPU::NAME)], profile.as_bytes()).unwrap();
        assert_eq!(found, [node("a", "GPU"), node("new", ep::CPU::NAME)]);
        // A library that tells of one such node rightly.
        let found = corrected(vec![node("gone", ep::CPU::NAME), node("a", "GPU")], profile.as_bytes()).unwrap();
        assert_eq!(found, [node("a", "GPU"), node("new", ep::CPU::NAME)]);
        // Compiled: the part is one node of the run, and its nodes are told.
        let profile = format!("[{}]", event("part_0_kernel_time", "NPU"));
        let told = vec![node("a", "NPU"), node("b", "NPU")];
        assert_eq!(corrected(told.clone(), profile.as_bytes()).unwrap(), told);
        assert!(corrected(vec![], b"[{").unwrap_err().contains("the profile of a run"));
    }
}
