//! NumPy's .npy files of `[N, C, H, W]` f32: noise in, samples out.
//!
//! The format (NumPy enhancement proposal 1): `\x93NUMPY`, two bytes of version, the length of the header (u16; u32 from
//! version 2), a Python dictionary with `descr`, `fortran_order` and `shape`, padded with spaces so that the data starts
//! at a multiple of 64. It is read here and not by a crate, because every size must be checked before memory is taken.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use ndarray::Array4;

use crate::aside::write_aside;
use crate::memory;

const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// The longest header that is read: numpy's own take less than a kilobyte.
const HEADER_BYTES: usize = 1 << 16;

/// Reads a little-endian f32 array of rank 4 in C order, where its shape is what `expected` takes; anything else is an
/// error with the remedy, found by the header alone.
pub fn read(path: &Path, expected: impl FnOnce([usize; 4]) -> Result<()>) -> Result<Array4<f32>> {
    let file = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
    let (len, file) = file.with_context(|| format!("{}: cannot read", path.display()))?;
    let mut rest = BufReader::new(file);
    let shape =
        shape_of_file(&mut rest, len).with_context(|| format!("{}: not the .npy file expected", path.display()))?;
    expected(shape).with_context(|| path.display().to_string())?;
    values(&mut rest, shape).with_context(|| format!("{}: cannot read", path.display()))
}

/// Writes format version 1.0, whole or not at all.
pub fn write(path: &Path, array: &Array4<f32>) -> Result<()> {
    let (n, c, h, w) = array.dim();
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({n}, {c}, {h}, {w}), }}");
    // Magic, version and length take 10 bytes, the line end one.
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 11;
    header = format!("{header:padded$}\n");
    write_aside(path, |file| {
        file.write_all(MAGIC)?;
        file.write_all(&[1, 0])?;
        file.write_all(&(header.len() as u16).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        array.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))?;
        Ok(())
    })
}

/// The shape that the header of a file of `len` bytes says, where as many values follow.
fn shape_of_file(file: &mut impl Read, len: u64) -> Result<[usize; 4]> {
    let (header, taken) = header(file)?;
    let header = header.as_str();
    let descr = entry(header, "descr")?.trim_start_matches(['\'', '"']);
    let descr = descr.split(['\'', '"']).next().unwrap_or(descr);
    ensure!(descr == "<f4", "dtype is {descr:?}, expected \"<f4\" (float32); in numpy: array.astype(\"float32\")");
    let is_fortran = entry(header, "fortran_order")?.starts_with("True");
    ensure!(!is_fortran, "the array is in fortran order, expected c order; in numpy: np.ascontiguousarray(array)");
    let shape = shape(header)?;
    let &[n, c, h, w] = shape.as_slice() else {
        bail!("shape is {shape:?}, expected rank 4: [N, C, H, W]");
    };
    let n_bytes = shape.iter().try_fold(4_usize, |product, &side| product.checked_mul(side));
    let n_bytes = n_bytes.with_context(|| format!("shape {shape:?} is larger than this machine can count"))?;
    let found = len.saturating_sub(taken);
    ensure!(found == n_bytes as u64, "shape {shape:?} needs {n_bytes} bytes of data, found {found}");
    Ok([n, c, h, w])
}

/// The values behind the header, as many as its shape says.
fn values(data: &mut impl Read, shape: [usize; 4]) -> Result<Array4<f32>> {
    memory::room("its values", &shape)?;
    let mut values = Array4::zeros(shape);
    let mut bytes = [0; 1 << 14];
    let room = values.as_slice_mut().context("an array just made is in C order")?;
    for part in room.chunks_mut(bytes.len() / 4) {
        let bytes = &mut bytes[..4 * part.len()];
        data.read_exact(bytes)?;
        part.iter_mut().zip(bytes.as_chunks().0).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
    }
    Ok(values)
}

/// The header's text, and the bytes read by its end.
fn header(file: &mut impl Read) -> Result<(String, u64)> {
    let mut begin = [0; 8];
    let magic = file.read_exact(&mut begin[..6]).is_ok() && begin[..6] == *MAGIC;
    ensure!(magic, "it does not start with numpy's magic bytes");
    file.read_exact(&mut begin[6..]).context("truncated before the version")?;
    let mut len = [0; 4];
    let n_len = if begin[6] == 1 { 2 } else { 4 };
    file.read_exact(&mut len[..n_len]).context("truncated before the header")?;
    let len = u32::from_le_bytes(len) as usize;
    ensure!(len <= HEADER_BYTES, "its header says {len} bytes, expected at most {HEADER_BYTES}");
    let mut header = vec![0; len];
    file.read_exact(&mut header).context("truncated in the header")?;
    Ok((String::from_utf8(header).context("the header is no text")?, (8 + n_len + len) as u64))
}

/// The text behind `'key':`.
fn entry<'a>(header: &'a str, key: &str) -> Result<&'a str> {
    let behind = |quote: char| header.split_once(&format!("{quote}{key}{quote}")).map(|(_, rest)| rest);
    let rest = behind('\'').or_else(|| behind('"')).with_context(|| format!("the header has no {key:?}"))?;
    Ok(rest.trim_start_matches([' ', ':']))
}

fn shape(header: &str) -> Result<Vec<usize>> {
    let inside = entry(header, "shape")?.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    let (sides, _) = inside.context("the header's shape is no tuple")?;
    let sides = sides.split(',').map(str::trim).filter(|side| !side.is_empty());
    sides.map(|side| side.parse().with_context(|| format!("the header's shape has a side of {side:?}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What NumPy 1 writes for `np.arange(2, dtype="float32").reshape(1, 1, 1, 2)`, with the dictionary as given.
    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{header:117}\n");
        [MAGIC.as_slice(), &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes(), data].concat()
    }

    #[test]
    fn writes_and_reads_what_numpy_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("noise.npy");
        let array = Array4::from_shape_fn((1, 1, 1, 2), |(.., x)| x as f32);
        write(&path, &array).unwrap();
        let data = [0, 0, 0, 0, 0, 0, 0x80, 0x3f];
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 2), }";
        assert_eq!(std::fs::read(&path).unwrap(), file(header, &data));
        assert_eq!(read(&path, |_| Ok(())).unwrap(), array);
        // An array whose memory is not in C order is written in C order.
        let turned =
            Array4::from_shape_fn((2, 3, 4, 5), |(n, c, h, w)| (n * 60 + c * 20 + h * 5 + w) as f32).reversed_axes();
        write(&path, &turned).unwrap();
        assert_eq!(read(&path, |_| Ok(())).unwrap(), turned);
        let refused = read(&path, |shape| bail!("{shape:?} is not wanted")).unwrap_err();
        assert!(format!("{refused:#}").ends_with("noise.npy: [5, 4, 3, 2] is not wanted"));
    }

    #[test]
    fn every_kind_of_broken_file_is_named() {
        let good = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 2), }";
        let check = |bytes: &[u8], expected: &str| {
            let message = format!("{:#}", shape_of_file(&mut &bytes[..], bytes.len() as u64).unwrap_err());
            assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        };
        check(b"", "magic");
        check(b"PK\x03\x04 a zip", "magic");
        check(&file(good, &[0; 8])[..40], "truncated in the header");
        check(&file(good, &[0; 7]), "shape [1, 1, 1, 2] needs 8 bytes of data, found 7");
        check(&file(good, &[0; 12]), "needs 8 bytes of data, found 12");
        check(&file(&good.replace("<f4", "<f8"), &[0; 16]), "dtype is \"<f8\", expected \"<f4\" (float32)");
        check(&file(&good.replace("False", "True"), &[0; 8]), "fortran order");
        check(&file(&good.replace("(1, 1, 1, 2)", "(2,)"), &[0; 8]), "shape is [2], expected rank 4");
        check(&file(&good.replace("(1, 1, 1, 2)", "(1, 1, 1, -2)"), &[0; 8]), "\"-2\"");
        check(&file(&good.replace("(1, 1, 1, 2)", "(4294967296, 4294967296, 4, 4)"), &[]), "larger than");
        check(&file(&good.replace("(1, 1, 1, 2)", "(9000000000, 1, 1, 1)"), &[]), "found 0");
        check(&file("{'descr': '<f4', }", &[]), "no \"fortran_order\"");
        check(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "its header says 2147483647 bytes, expected at most 65536");
        let missing = read(Path::new("no/such.npy"), |_| Ok(())).unwrap_err();
        assert!(format!("{missing:#}").starts_with("no/such.npy: cannot read"));
    }
}
