//! Where a file runs, and why there: what was tried in the order of the app's list, and how what was taken was proven.

use std::fmt;

use serde::Serialize;

/// What runs where. `Display` is one line.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Placement {
    /// What runs the graph, as [`Accelerator`](crate::Accelerator) is printed; `CPU`, where that is ONNX Runtime's own
    /// kernels; `tract`.
    pub accelerator: String,
    /// ONNX Runtime's name of it, as in `nodes`.
    pub provider: String,
    /// The nodes that ONNX Runtime runs, after its rewrites, with what runs each. None where the processor runs all.
    pub nodes: Vec<PlacedNode>,
    /// How the accelerator's picture compares with the processor's; `None` for the processor.
    pub probe: Option<Probe>,
    /// What stood before it in the list, and why it was not taken.
    pub passed_over: Vec<PassedOver>,
}

/// A node of the graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlacedNode {
    /// Its name.
    pub name: String,
    /// Its operator.
    pub operator: String,
    /// What runs it, by ONNX Runtime's name.
    pub provider: String,
}

/// An accelerator's picture of fixed noise beside the processor's, of the same file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Probe {
    /// The greatest difference of a value, where pictures are in `[-1, 1]`.
    pub max_difference: f64,
    /// The peak signal to noise ratio in dB; infinite where nothing differs.
    pub psnr_db: f64,
}

/// An accelerator that was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PassedOver {
    /// As it is printed.
    pub accelerator: String,
    /// Where it failed.
    pub step: Step,
    /// Why.
    pub reason: String,
}

/// What an accelerator goes through before it is taken, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// The library has it, or its plug-in can be loaded.
    Registered,
    /// There is a device for it.
    Device,
    /// It takes the file, with the options that it is given.
    Session,
    /// It takes a node of the graph at least, and all where that is required.
    Assignment,
    /// It makes the processor's picture.
    Probe,
    /// It was taken, and failed in a later call.
    Run,
}

impl Placement {
    /// Nodes that run on what was taken, and all nodes. Both 0 where the processor runs all.
    pub fn taken(&self) -> (usize, usize) {
        (self.nodes.iter().filter(|node| node.provider == self.provider).count(), self.nodes.len())
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.accelerator)?;
        if let Some(probe) = &self.probe {
            let (taken, all) = self.taken();
            write!(f, ": {taken} of {all} nodes, {probe}")?;
        }
        for (at, PassedOver { accelerator, step, reason }) in self.passed_over.iter().enumerate() {
            let join = if at == 0 { "; passed over:" } else { "," };
            write!(f, "{join} {accelerator} ({step}: {reason})")?;
        }
        Ok(())
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {:.1e} ({:.1} dB) from the processor's picture", self.max_difference, self.psnr_db)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Registered => "not there",
            Step::Device => "no device",
            Step::Session => "no session",
            Step::Assignment => "too few nodes",
            Step::Probe => "another picture",
            Step::Run => "failed",
        })
    }
}

/// One line for each, for an error.
pub(crate) fn list(passed_over: &[PassedOver]) -> String {
    let line = |PassedOver { accelerator, step, reason }: &PassedOver| format!("\n  {accelerator}: {step}: {reason}");
    passed_over.iter().map(line).collect()
}
