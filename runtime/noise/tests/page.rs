//! docs/noise.md, held to the crate.

use dmd_noise::{PICTURE_NOISE, REFINING_NOISE, Stream};

const PAGE: &str = include_str!("../../../docs/noise.md");

#[test]
fn the_vectors_of_the_page_are_the_numbers_of_the_crate() {
    let vectors: Vec<serde_json::Value> = serde_json::from_str(include_str!("../vectors.json")).unwrap();
    let line = |vector: &serde_json::Value| {
        let stream = stream(vector);
        let words: Vec<String> = stream.words(4).iter().map(|word| format!("{word:08x}")).collect();
        let normals: Vec<String> = stream.normal(2).iter().map(f32::to_string).collect();
        let Stream { seed, purpose, index } = stream;
        format!("{seed} {purpose:#x} {index}: {}; {}\n", words.join(" "), normals.join(" "))
    };
    let lines: String = vectors.iter().map(line).collect();
    let expected = format!("```vectors\nseed purpose index: words; normals\n{lines}```");
    assert!(PAGE.contains(&expected), "docs/noise.md should have this block:\n{expected}");
}

/// The values come from ports/noise.py, which is Python's standard library alone; examples/web tests its JavaScript by
/// the same file. Here, with libm's logarithm, sine and cosine, even their last bits agree.
#[test]
fn the_vectors_for_ports_hold_in_the_crate() {
    let vectors: Vec<serde_json::Value> = serde_json::from_str(include_str!("../vectors.json")).unwrap();
    assert!(!vectors.is_empty());
    for vector in vectors {
        let words: Vec<u32> = serde_json::from_value(vector["words"].clone()).unwrap();
        let normals: Vec<f32> = serde_json::from_value(vector["normals"].clone()).unwrap();
        assert_eq!(stream(&vector).words(words.len()), words, "{vector}");
        assert_eq!(stream(&vector).normal(normals.len()), normals, "{vector}");
    }
}

#[test]
fn the_purposes_of_the_page_are_those_of_the_crate() {
    let rows = [format!("\n| {PICTURE_NOISE} | the noise that becomes"), format!("\n| {REFINING_NOISE:#x} + `pass` |")];
    rows.iter().for_each(|row| assert!(PAGE.contains(row), "docs/noise.md should have {row:?}"));
}

fn stream(vector: &serde_json::Value) -> Stream {
    let number = |key: &str| -> u64 { vector[key].as_str().unwrap().parse().unwrap() };
    Stream::new(number("seed"), number("purpose").try_into().unwrap(), number("index"))
}
