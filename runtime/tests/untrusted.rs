//! Files that would make an engine read what it should not, run without end, or take memory for what is only claimed: each
//! is refused before an engine sees it, with a sentence that says which part of the file it is.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Tiny, constant, field, floats, int, ints, node, number, outside, whole};
use dmd_runtime::{EngineChoice, EngineKind, Generator, Info, Options, Request, engines};
use ndarray::Array4;

/// What is said of a file that must be refused, whatever it is read for.
fn refused(model: &Tiny) -> String {
    let bytes = model.bytes();
    let reason = Info::from_bytes(&bytes).unwrap_err().to_string();
    let loaded = Generator::from_bytes(&bytes, Options::default()).expect_err("it must not load");
    assert_eq!(loaded.to_string(), reason);
    reason
}

fn check(model: &Tiny, expected: &[&str]) {
    let reason = refused(model);
    assert!(expected.iter().all(|part| reason.contains(part)), "expected {expected:?} in: {reason}");
}

fn present() -> Vec<EngineChoice> {
    let present = engines(None).into_iter().filter(|engine| engine.is_present());
    let choice = |kind| if kind == EngineKind::Tract { EngineChoice::Tract } else { EngineChoice::OnnxRuntime };
    present.map(|engine| choice(engine.kind)).collect()
}

/// The picture of a noise of ones, from a file that one and the same engine opened.
fn picture(path: &Path, engine: EngineChoice) -> Result<Vec<f32>, dmd_runtime::Error> {
    let generator = Generator::load(path, Options { engine, ..Options::default() })?;
    let images = generator.run(Array4::ones((1, 1, 4, 4)).view(), &[])?;
    Ok(images.to_f32().into_raw_vec_and_offset().0)
}

#[test]
fn the_tiny_file_itself_runs() {
    for engine in present() {
        let generator =
            Generator::from_bytes(&Tiny::default().bytes(), Options { engine, ..Options::default() }).unwrap();
        let images = generator.run(Array4::ones((1, 1, 4, 4)).view(), &[]).unwrap();
        assert!(images.to_f32().iter().all(|x| *x == 0.5), "{engine:?}");
    }
}

#[test]
fn only_what_the_exporter_writes_may_run() {
    let add = node("Add", &["pre", "k"], &["image"], &[]);
    let with = |operator: &str, attributes: &[Vec<u8>]| {
        Tiny::with_nodes(&[node(operator, &[], &["k"], attributes), add.clone()])
    };
    let tensor = |fields: Vec<u8>| [field(1, "value"), number(20, 4), field(5, fields)].concat();
    // Constants by every field that could hold a tensor or a graph.
    let secret = outside("s", &[1], &[("location", "../secret.bin")]);
    check(&with("Constant", &[tensor(secret.clone())]), &["node \"k\" (Constant)", "writes no such operator"]);
    check(&with("Relu", &[tensor(secret.clone())]), &["node \"k\" (Relu)", "attribute \"value\" holds a tensor"]);
    for (number, what) in [(6, "a graph"), (10, "a tensor"), (11, "a graph"), (21, "a function"), (22, "a tensor")] {
        let attribute = [field(1, "axis"), field(number, b"")].concat();
        check(&with("Softmax", &[attribute]), &["node \"k\" (Softmax)", what]);
    }
    check(&with("Loop", &[[field(1, "body"), number(20, 5), field(6, b"")].concat()]), &["node \"k\" (Loop)"]);
    check(&with("Conv", &[int("dilations", 3)]), &["node \"k\" (Conv)", "no attribute \"dilations\""]);
    check(&with("Cast", &[int("to", 8)]), &["node \"k\" (Cast)", "casts to type [8]"]);
    // What engines may read in two ways.
    check(&with("Softmax", &[int("axis", 1), int("axis", 2)]), &["attribute \"axis\" twice"]);
    let both = [int("axis", 1), number(8, 2)].concat();
    check(&with("Softmax", &[both]), &["\"axis\" holds both a number and a list"]);
    // Operators of others, by their name or under a known one.
    let mut foreign = with("Relu", &[]);
    foreign.nodes[0].extend(field(7, "my.lib"));
    check(&foreign, &["node \"k\" (my.lib.Relu)"]);
    // What ONNX Runtime writes into its own format is nothing for an ONNX file.
    check(&with("Exp", &[]), &["node \"k\" (Exp)"]);

    let nodes = [node("Relu", &["pre"], &["image"], &[])];
    check(&Tiny { graph: field(15, b""), ..Tiny::with_nodes(&nodes) }, &["sparse weights"]);
    check(&Tiny { model: field(25, field(1, "Relu")), ..Tiny::with_nodes(&nodes) }, &["functions of its own"]);
    check(&Tiny { model: field(20, b""), ..Tiny::with_nodes(&nodes) }, &["a training graph"]);
    check(&Tiny { model: field(8, number(2, 11)), ..Tiny::default() }, &["ai.onnx version 11, expected 17 to 21"]);
    let text = Tiny { constants: vec![constant("t", 8, &[1], b"text")], ..Tiny::default() };
    check(&text, &["constant \"t\" is of type 8"]);
}

#[test]
fn names_in_errors_cannot_command_a_terminal() {
    let model = Tiny::with_nodes(&[node("Bad\x1b[31mOp", &["pre"], &["a\x1b]0;title\x07"], &[])]);
    let reason = refused(&model);
    assert!(!reason.contains(char::is_control), "{reason:?}");
    assert!(reason.contains("Bad\\u{1b}[31mOp"), "{reason}");
}

#[test]
fn weights_outside_lie_in_one_file_beside_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("inside");
    fs::create_dir(&inside).unwrap();
    fs::write(folder.path().join("secret.bin"), 0.5f32.to_le_bytes()).unwrap();
    fs::write(inside.join("two.bin"), [0.5f32, 0.25].map(f32::to_le_bytes).concat()).unwrap();
    let model = inside.join("model.onnx");
    let secret = folder.path().join("secret.bin");
    let one = [1, 1, 1, 1];
    let load = |weight: Vec<u8>, constants: Vec<Vec<u8>>| {
        fs::write(&model, Tiny { weight, constants, ..Tiny::default() }.bytes()).unwrap();
        Info::read(&model)
    };
    let check = |entries: &[(&str, &str)], constants: &[Vec<u8>], expected: &str| {
        let reason = load(outside("weight", &one, entries), constants.to_vec()).unwrap_err().to_string();
        assert!(reason.contains(expected), "{entries:?}: {reason}");
        assert!(reason.contains("model.onnx: "), "{reason}");
    };
    for place in ["../secret.bin", secret.to_str().unwrap(), "", "..", "*/_ORT_MEM_ADDR_/*", "a/two.bin", "C:two.bin"] {
        check(&[("location", place), ("length", "4"), ("offset", "65")], &[], "expected one file beside it");
    }
    check(&[("location", "none.bin")], &[], "none.bin: ");
    check(&[("location", "two.bin"), ("location", "../secret.bin")], &[], "\"location\" twice");
    check(&[("location", "two.bin"), ("offset", "8")], &[], "lies beyond the end of");
    check(&[("location", "two.bin"), ("offset", "18446744073709551615")], &[], "lies beyond the end of");
    check(&[("location", "two.bin"), ("length", "18446744073709551615")], &[], "holds 18446744073709551615");
    check(&[("location", "two.bin"), ("length", "-1")], &[], "no number");
    let other = outside("other", &one, &[("location", "other.bin")]);
    check(&[("location", "two.bin")], &[other], "expected one file beside it");
    // A small file is no large model: nothing is read twice.
    let again = |n: usize| outside(&format!("w{n}"), &[2], &[("location", "two.bin")]);
    check(&[("location", "two.bin")], &[again(0), again(1)], "20 bytes are asked for, of the 8 that");

    // A file without a length is legal, and means the rest; so is one in memory, if it has all in itself.
    load(outside("weight", &one, &[("location", "two.bin"), ("offset", "4")]), vec![]).unwrap();
    for engine in present() {
        assert_eq!(picture(&model, engine).unwrap(), [0.25; 16], "{engine:?}");
    }
    let reason = Info::from_bytes(&fs::read(&model).unwrap()).unwrap_err().to_string();
    assert!(reason.contains("without a path"), "{reason}");
}

#[cfg(unix)]
#[test]
fn links_work_where_model_and_data_are_kept_together_and_lead_nowhere_else() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { folder.path().join(name) };
    ["blobs", "snapshots", "snapshots/1", "other"].iter().for_each(|name| fs::create_dir(at(name)).unwrap());
    let weight = outside("weight", &[1, 1, 1, 1], &[("location", "m.onnx.data")]);
    fs::write(at("blobs/aa"), Tiny { weight, ..Tiny::default() }.bytes()).unwrap();
    fs::write(at("blobs/bb"), 0.75f32.to_le_bytes()).unwrap();
    fs::write(at("other/cc"), 0.125f32.to_le_bytes()).unwrap();
    // As in the cache of Hugging Face's hub.
    symlink("../../blobs/aa", at("snapshots/1/m.onnx")).unwrap();
    symlink("../../blobs/bb", at("snapshots/1/m.onnx.data")).unwrap();
    for engine in present() {
        assert_eq!(picture(&at("snapshots/1/m.onnx"), engine).unwrap(), [0.75; 16], "{engine:?}");
    }
    fs::remove_file(at("snapshots/1/m.onnx.data")).unwrap();
    symlink("../../other/cc", at("snapshots/1/m.onnx.data")).unwrap();
    for engine in present() {
        let reason = picture(&at("snapshots/1/m.onnx"), engine).unwrap_err().to_string();
        assert!(reason.contains("are a link to") && reason.contains("other/cc"), "{reason}");
    }
}

#[test]
fn sizes_are_checked_before_memory_is_taken() {
    check(&Tiny { shape: [1, 1, 32768, 32768], ..Tiny::default() }, &["[1, 1, 32768, 32768] values at once"]);
    check(&Tiny { shape: [1 << 32, 1, 1 << 32, 1], ..Tiny::default() }, &["values at once"]);
    let huge = Tiny { constants: vec![floats("w", &[1 << 40, 1 << 40], &[])], ..Tiny::default() };
    check(&huge, &["constant \"w\" has shape"]);
    let empty = Tiny { constants: vec![floats("w", &[1 << 30], &[])], ..Tiny::default() };
    check(&empty, &["constant \"w\" is f32 [1073741824], 4294967296 bytes, and holds 0"]);

    // A few bytes of nodes whose values grow: by factors, by padding, by joining, by products of a row and a column, by rank.
    let chain = |n: usize, step: &dyn Fn(&str, &str) -> Vec<u8>| -> Vec<Vec<u8>> {
        (0..n)
            .map(|i| step(if i == 0 { "pre".into() } else { format!("x{i}") }.as_str(), &format!("x{}", i + 1)))
            .collect()
    };
    let grows = |nodes: Vec<Vec<u8>>, constants: Vec<Vec<u8>>, expected: &str| {
        check(&Tiny { constants, ..Tiny::with_nodes(&nodes) }, &["node \"", expected]);
    };
    let twice = vec![floats("scales", &[4], &[1.0, 1.0, 2.0, 2.0]), floats("roi", &[0], &[])];
    grows(chain(40, &|x, y| node("Resize", &[x, "roi", "scales"], &[y], &[])), twice, "(Resize): it gives");
    let scales = floats("scales", &[4], &[1.0, 1.0, f32::INFINITY, f32::NAN]);
    grows(vec![node("Resize", &["pre", "", "scales"], &["image"], &[])], vec![scales], "a length becomes");
    let pads = whole("pads", &[0, 0, 0, 0, 0, 0, i64::MAX, i64::MAX]);
    grows(vec![node("Pad", &["pre", "pads"], &["image"], &[])], vec![pads], "a length becomes");
    grows(chain(40, &|x, y| node("Concat", &[x, x], &[y], &[int("axis", 1)])), vec![], "(Concat): it gives");
    let numbers = vec![whole("x0", &[1; 4])];
    let doubles =
        (0..40).map(|i| node("Concat", &[&format!("x{i}"), &format!("x{i}")], &[&format!("x{}", i + 1)], &[]));
    grows(doubles.collect(), numbers, "(Concat): a length becomes");
    let (column, row) = (whole("column", &[1, 1, 1 << 28, 1]), whole("row", &[1, 1, 1, 1 << 28]));
    let reshape = |shape: &str| node("Reshape", &["pre", shape], &[&format!("by_{shape}")], &[]);
    grows(vec![reshape("column"), reshape("row")], vec![column, row], "has not as many values");
    let (column, row) = (whole("column", &[1, 1, 16, 1]), whole("row", &[1, 1, 1, 16]));
    let mut nodes = vec![reshape("column"), reshape("row"), node("Mul", &["by_column", "by_row"], &["square"], &[])];
    nodes.extend((0..14).map(|i| {
        let x = if i == 0 { "square".into() } else { format!("p{i}") };
        node("Concat", &[&x, &x, &x, &x], &[&format!("p{}", i + 1)], &[int("axis", 1)])
    }));
    grows(nodes, vec![column, row], "(Concat): it gives");
    grows(chain(40, &|x, y| node("Gather", &[x, x], &[y], &[])), vec![], "of rank");
    let strides = node("ConvTranspose", &["pre", "weight"], &["image"], &[ints("strides", &[u64::MAX >> 1, 1 << 40])]);
    grows(vec![strides], vec![], "a length becomes");
    // Values that stay small, and hours to compute them.
    let square = Tiny {
        shape: [1, 1, 4096, 4096],
        ..Tiny::with_nodes(&chain(5000, &|x, y| node("MatMul", &[x, "pre"], &[y], &[])))
    };
    check(&square, &["(MatMul)", "products to compute"]);
    // Names that are no order.
    check(
        &Tiny::with_nodes(&[node("Add", &["pre", "b"], &["a"], &[]), node("Relu", &["a"], &["b"], &[])]),
        &["its own value"],
    );
    check(&Tiny::with_nodes(&[node("Relu", &["nowhere"], &["image"], &[])]), &["nothing gives its input"]);
    let twice = [node("Relu", &["pre"], &["image"], &[]), node("Tanh", &["pre"], &["image"], &[])];
    check(&Tiny::with_nodes(&twice), &["node \"image\" (Tanh)", "defined twice"]);
}

#[test]
fn reading_costs_no_more_than_the_largest_real_files_would() {
    let many = Tiny::with_nodes(&vec![vec![]; 1 << 20]);
    check(&many, &["more than a million nodes"]);
    let long = "x".repeat(1 << 20);
    let metadata = (0..17).map(|i| (format!("k{i}"), long.clone())).collect();
    check(&Tiny { metadata, ..Tiny::default() }, &["more than 16 MiB"]);
}

/// An `.ort` file (ONNX Runtime's schema ort.fbs, a flatbuffer) in which all `n` entries of one vector are one and the same
/// table, with a text of `length` bytes: the model's metadata, or the graph's nodes.
fn aliases(n: usize, length: usize, nodes: bool) -> Vec<u8> {
    let mut file = b"\0\0\0\0ORTM".to_vec();
    fn pad(file: &mut Vec<u8>) {
        file.resize(file.len().next_multiple_of(4), 0);
    }
    fn point(file: &mut [u8], at: usize, to: usize) {
        file[at..at + 4].copy_from_slice(&((to - at) as u32).to_le_bytes());
    }
    /// A table of so many fields, of which some are present; gives where it and they are.
    fn table(file: &mut Vec<u8>, fields: usize, present: &[usize]) -> (usize, Vec<usize>) {
        pad(file);
        let layout = file.len();
        file.extend((4 + 2 * fields as u16).to_le_bytes());
        file.extend((4 + 4 * present.len() as u16).to_le_bytes());
        let place = |field| present.iter().position(|other| *other == field).map_or(0, |i| 4 + 4 * i as u16);
        file.extend((0..fields).flat_map(|field| place(field).to_le_bytes()));
        pad(file);
        let at = file.len();
        file.extend(((at - layout) as i32).to_le_bytes());
        file.resize(at + 4 + 4 * present.len(), 0);
        (at, (0..present.len()).map(|i| at + 4 + 4 * i).collect())
    }
    fn vector(file: &mut Vec<u8>, at: usize, n: usize) -> usize {
        pad(file);
        let start = file.len();
        point(file, at, start);
        file.extend((n as u32).to_le_bytes());
        file.resize(start + 4 + 4 * n, 0);
        start + 4
    }
    fn text(file: &mut Vec<u8>, at: &[usize], text: &[u8]) {
        pad(file);
        let start = file.len();
        at.iter().for_each(|at| point(file, *at, start));
        file.extend((text.len() as u32).to_le_bytes());
        file.extend(text);
    }
    let (session, at) = table(&mut file, 3, &[1]);
    point(&mut file, 0, session);
    let (model, model_at) = table(&mut file, 10, &[1, 7, 9]);
    point(&mut file, at[0], model);
    let (graph, graph_at) = table(&mut file, 10, &[2]);
    point(&mut file, model_at[1], graph);
    let opsets = vector(&mut file, model_at[0], 1);
    let (opset, opset_at) = table(&mut file, 2, &[0]);
    point(&mut file, opsets, opset);
    text(&mut file, &opset_at, b"ai.onnx");
    vector(&mut file, if nodes { model_at[2] } else { graph_at[0] }, 0);
    let places = vector(&mut file, if nodes { graph_at[0] } else { model_at[2] }, n);
    let (one, one_at) = table(&mut file, if nodes { 13 } else { 2 }, if nodes { &[0, 5] } else { &[0, 1] });
    (0..n).for_each(|i| point(&mut file, places + 4 * i, one));
    text(&mut file, &one_at, &vec![b'a'; length]);
    file
}

#[test]
fn an_ort_file_whose_tables_are_one_and_the_same_costs_nothing() {
    for nodes in [false, true] {
        let start = Instant::now();
        for (n, length) in [(40_000, 40_000), (500_000, 20), (1 << 20, 1)] {
            let reason = Info::from_bytes(&aliases(n, length, nodes)).unwrap_err().to_string();
            assert!(reason.contains("more than"), "{reason}");
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
    // The same file with a few of them is only not ours.
    let reason = Info::from_bytes(&aliases(10, 10, false)).unwrap_err().to_string();
    assert!(reason.contains("not one of ours"), "{reason}");
}

#[test]
fn more_threads_than_cores_are_held_down_and_said() {
    for engine in present() {
        let options = Options { engine, threads: Some(100_000), ..Options::default() };
        let start = Instant::now();
        let generator = Generator::from_bytes(&Tiny::default().bytes(), options).unwrap();
        generator.generate(&Request::default()).unwrap();
        assert!(start.elapsed() < Duration::from_secs(10), "{engine:?}: {:?}", start.elapsed());
        let warning = generator.engine().warning.as_deref().unwrap();
        assert!(warning.contains("100000 threads are too many"), "{warning}");
        let few =
            Generator::from_bytes(&Tiny::default().bytes(), Options { engine, threads: Some(2), ..Options::default() });
        assert_eq!(few.unwrap().engine().warning, None);
    }
}

#[test]
fn a_file_in_memory_makes_the_pictures_of_the_file_on_disk() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/classes-f32.onnx");
    let bytes = fs::read(&path).unwrap();
    assert_eq!(Info::from_bytes(&bytes).unwrap(), Info::read(&path).unwrap());
    for engine in present() {
        let options = || Options { engine, ..Options::default() };
        let request = Request { seed: 4, batch: 3, ..Request::default() };
        let from_disk = Generator::load(&path, options()).unwrap().generate(&request).unwrap();
        assert_eq!(Generator::from_bytes(&bytes, options()).unwrap().generate(&request).unwrap(), from_disk);
    }
    let reason = Info::from_bytes(b"no model").unwrap_err().to_string();
    assert!(reason.starts_with("the model in memory: not a whole ONNX file"), "{reason}");
}
