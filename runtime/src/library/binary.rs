//! Looks at a library before the system's loader does, which trusts its headers: of a file that is cut off it reads beyond
//! the end, and the process dies by SIGBUS.

use std::env::consts::ARCH;
use std::fs::File;
use std::path::Path;

use object::read::macho::{FatArch, MachOFatFile32};
use object::{Architecture, BinaryFormat, FileKind, Object, ObjectKind, ObjectSegment, ReadCache, ReadRef};

/// Whether this is a whole library for this machine; otherwise what it is instead.
pub(crate) fn check(path: &Path) -> Result<(), String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let bytes = file.metadata().map_err(|error| error.to_string())?.len();
    let cache = ReadCache::new(file);
    match FileKind::parse(&cache) {
        Ok(FileKind::MachOFat32) => {
            let parts = MachOFatFile32::parse(&cache).map_err(broken)?;
            let ours = parts.arches().iter().find(|part| Some(part.architecture()) == architecture());
            let (offset, size) = ours.ok_or_else(|| format!("has no part for {ARCH}"))?.file_range();
            check_end(offset.checked_add(size), bytes)?;
            check_part(cache.range(offset, size), size)
        }
        Ok(_) => check_part(&cache, bytes),
        Err(_) => Err(format!("is no library: a file of {bytes} bytes of another kind")),
    }
}

fn check_part<'a>(data: impl ReadRef<'a>, bytes: u64) -> Result<(), String> {
    let library = object::File::parse(data).map_err(broken)?;
    let (format, machine) = (library.format(), library.architecture());
    if format != own_format() || architecture().is_some_and(|own| machine != own) {
        return Err(format!(
            "is a library for {machine:?} in the format {format:?}, expected {ARCH} in {:?}",
            own_format()
        ));
    }
    if library.kind() != ObjectKind::Dynamic {
        return Err(format!("is no library that can be loaded, but of the kind {:?}", library.kind()));
    }
    library
        .segments()
        .map(|segment| segment.file_range())
        .try_for_each(|(at, n)| check_end(at.checked_add(n), bytes))?;
    // Sections may lie behind all segments: what is left of an interrupted download ends before them.
    library
        .sections()
        .filter_map(|section| object::ObjectSection::file_range(&section))
        .try_for_each(|(at, n)| check_end(at.checked_add(n), bytes))
}

/// Whether what ends here lies within the file.
fn check_end(end: Option<u64>, bytes: u64) -> Result<(), String> {
    match end {
        Some(end) if end <= bytes => Ok(()),
        _ => Err(format!("is cut off: it has {bytes} bytes, and its headers speak of more")),
    }
}

fn broken(error: object::Error) -> String {
    format!("is no whole library: {error}")
}

fn own_format() -> BinaryFormat {
    match std::env::consts::OS {
        "windows" => BinaryFormat::Pe,
        "macos" | "ios" => BinaryFormat::MachO,
        _ => BinaryFormat::Elf,
    }
}

/// This machine's; `None` where it is none that we know a name of.
fn architecture() -> Option<Architecture> {
    match ARCH {
        "x86_64" => Some(Architecture::X86_64),
        "aarch64" => Some(Architecture::Aarch64),
        "x86" => Some(Architecture::I386),
        "arm" => Some(Architecture::Arm),
        "riscv64" => Some(Architecture::Riscv64),
        _ => None,
    }
}

#[cfg(all(test, target_os = "linux", target_pointer_width = "64", target_endian = "little"))]
mod tests {
    use super::*;

    const X86_64: u16 = 62;
    const AARCH64: u16 = 183;

    /// The headers of an ELF library (System V ABI, chapters 4 and 5): one segment that holds the whole file of `bytes`, and
    /// at its end those of two sections, the empty one and that of the names.
    fn elf(machine: u16, kind: u16, bytes: u64) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        let half = |file: &mut Vec<u8>, values: &[u16]| file.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        half(&mut file, &[kind, machine]);
        file.extend(1u32.to_le_bytes());
        file.extend([0, 64, bytes - 128].iter().flat_map(|v: &u64| v.to_le_bytes()));
        file.extend(0u32.to_le_bytes());
        half(&mut file, &[64, 56, 1, 64, 2, 1]);
        file.extend([1u32, 5].iter().flat_map(|v| v.to_le_bytes()));
        file.extend([0, 0, 0, bytes, bytes, 4096].iter().flat_map(|v: &u64| v.to_le_bytes()));
        file.resize(bytes as usize - 64, 0);
        file.extend([0u32, 3].iter().flat_map(|v| v.to_le_bytes()));
        file.extend([0, 0, 120, 1, 0, 1, 0].iter().flat_map(|v: &u64| v.to_le_bytes()));
        file
    }

    fn verdict(bytes: &[u8]) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("library");
        std::fs::write(&path, bytes).unwrap();
        check(&path)
    }

    #[test]
    fn a_library_is_known_by_its_headers_before_it_is_loaded() {
        let (ours, other) = if ARCH == "x86_64" { (X86_64, AARCH64) } else { (AARCH64, X86_64) };
        let whole = elf(ours, 3, 4096);
        assert_eq!(verdict(&whole), Ok(()));
        for cut in [4095, 4032, 2000, 120, 64, 16] {
            assert!(verdict(&whole[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = whole.clone();
        longer[96..104].copy_from_slice(&u64::MAX.to_le_bytes());
        let mach_o =
            [0xfeed_facf_u32, 0x0100_0007, 3, 6, 0, 0, 0, 0].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        for (bytes, expected) in [
            (longer, "is cut off"),
            (elf(other, 3, 4096), "is a library for"),
            (elf(ours, 1, 4096), "of the kind Relocatable"),
            (mach_o, "in the format MachO"),
            (b"<!DOCTYPE html>".repeat(9), "another kind"),
            (vec![], "another kind"),
        ] {
            let found = verdict(&bytes).unwrap_err();
            assert!(found.contains(expected), "{found}");
        }
    }
}
