use std::fs;
use std::io::{Cursor, Write};

use image::{DynamicImage, GrayAlphaImage, ImageBuffer, ImageFormat, Luma, LumaA, Rgb, RgbImage, Rgba, RgbaImage};
use tempfile::TempDir;

use super::*;

const OPTIONS: DataOptions =
    DataOptions { size: [4, 4], grey: false, unconditional: false, captions: false, strict: false };

/// A paletted PNG of two pixels: opaque red, and blue with an alpha of 51 (a fifth). Made with Python's zlib.
const PALETTED: &[u8] = b"\
    \x89\x50\x4e\x47\x0d\x0a\x1a\x0a\x00\x00\x00\x0d\x49\x48\x44\x52\x00\x00\x00\x02\x00\x00\x00\x01\x08\x03\
    \x00\x00\x00\xc3\xfc\x8f\xb8\x00\x00\x00\x06\x50\x4c\x54\x45\xff\x00\x00\x00\x00\xff\x6c\xa1\xfd\x8e\x00\
    \x00\x00\x02\x74\x52\x4e\x53\xff\x33\x5a\x67\x51\x5c\x00\x00\x00\x0b\x49\x44\x41\x54\x78\xda\x63\x60\x60\
    \x04\x00\x00\x04\x00\x02\x2c\xde\x48\xad\x00\x00\x00\x00\x49\x45\x4e\x44\xae\x42\x60\x82";
/// The header of a PNG of 16,000 by 16,000 pixels with 16-bit RGBA, which is 2 GB, and nearly no data.
const BOMB: &[u8] = b"\
    \x89\x50\x4e\x47\x0d\x0a\x1a\x0a\x00\x00\x00\x0d\x49\x48\x44\x52\x00\x00\x3e\x80\x00\x00\x3e\x80\x10\x06\
    \x00\x00\x00\x11\xee\x03\x9d\x00\x00\x00\x0c\x49\x44\x41\x54\x78\x9c\x63\x60\xa0\x3d\x00\x00\x00\x64\x00\
    \x01\x86\x64\x3c\x35\x00\x00\x00\x00\x49\x45\x4e\x44\xae\x42\x60\x82";

fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A PNG of 4 by 4 pixels in one grey.
fn png(value: u8) -> Vec<u8> {
    encode(RgbImage::from_pixel(4, 4, Rgb([value; 3])), ImageFormat::Png)
}

fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    folder
}

/// The same files as a zip, every second one deflated, in reverse order.
fn zipped(files: &[(&str, Vec<u8>)]) -> TempDir {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (index, (name, bytes)) in files.iter().enumerate().rev() {
        let method = [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated][index % 2];
        zip.start_file(*name, zip::write::SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    folder(&[("set.zip", zip.finish().unwrap().into_inner())])
}

fn load_files(files: &[(&str, Vec<u8>)], options: &DataOptions) -> Result<Pictures> {
    let from_folder = load(folder(files).path(), options, |_, _| {});
    let from_zip = load(&zipped(files).path().join("set.zip"), options, |_, _| {});
    // The folder's own name apart, which a zip has not.
    let inside = |pictures: &Result<Pictures>| {
        let mut pictures = pictures.as_ref().ok().cloned()?;
        pictures.shared.remove(0);
        Some(pictures)
    };
    assert_eq!(inside(&from_folder), inside(&from_zip), "a zip must give what the folder gives");
    from_folder
}

/// The pixels of one file, `[C, H, W]`.
fn decode(bytes: &[u8], size: [usize; 2], grey: bool) -> Vec<u8> {
    load_files(&[("a.png", bytes.to_vec())], &DataOptions { size, grey, ..OPTIONS }).unwrap().pixels
}

fn check_error(files: &[(&str, Vec<u8>)], options: &DataOptions, expected: &str) {
    let message = format!("{:#}", load_files(files, options).unwrap_err());
    assert!(message.contains(expected), "{message:?} lacks {expected:?}");
}

#[test]
fn folders_are_classes_and_everything_is_sorted() {
    let files = [("dogs/b.PNG", png(3)), ("cats/z.png", png(2)), ("cats/black/a.png", png(1)), ("dogs/a.png", png(4))];
    let pictures = load_files(&files, &OPTIONS).unwrap();
    assert_eq!(pictures.classes, ["cats", "cats/black", "dogs"]);
    assert_eq!(pictures.names, ["cats/black/a.png", "cats/z.png", "dogs/a.png", "dogs/b.PNG"]);
    assert_eq!(pictures.labels, [1, 0, 2, 2]);
    assert_eq!(pictures.pixels, [[1_u8; 48], [2; 48], [4; 48], [3; 48]].concat());
    assert_eq!((pictures.channels, pictures.height, pictures.width, pictures.len()), (3, 4, 4, 4));
}

#[test]
fn folders_that_all_pictures_share_are_no_class() {
    let files = [("archive/train/cats/a.png", png(1)), ("archive/train/dogs/a.png", png(2))];
    assert_eq!(load_files(&files, &OPTIONS).unwrap().classes, ["cats", "dogs"]);
    for name in ["archive/train/a.png", "cats/a.png", "a.png"] {
        let pictures = load_files(&[(name, png(1))], &OPTIONS).unwrap();
        assert!(pictures.classes.is_empty() && pictures.labels.is_empty(), "{name}");
    }
}

#[test]
fn pictures_beside_class_folders_are_refused_unless_unconditional() {
    let files = [("set/a.png", png(1)), ("set/cats/b.png", png(2)), ("set/dogs/c.png", png(3))];
    check_error(&files, &OPTIONS, "1 of 3 pictures lie beside the class folders and have no class, such as set/a.png");
    let pictures = load_files(&files, &DataOptions { unconditional: true, ..OPTIONS }).unwrap();
    assert_eq!((pictures.len(), pictures.classes.len(), pictures.labels.len()), (3, 0, 0));
}

#[test]
fn hidden_files_and_other_files_are_passed_over() {
    let files = [
        ("a/1.png", png(1)),
        ("a/._1.png", png(9)),
        ("a/notes.txt", b"text".to_vec()),
        (".cache/1.png", png(9)),
        ("__MACOSX/a/1.png", png(9)),
        ("b/2.jpeg", encode(RgbImage::from_pixel(4, 4, Rgb([2; 3])), ImageFormat::Jpeg)),
    ];
    let pictures = load_files(&files, &OPTIONS).unwrap();
    assert_eq!(pictures.names, ["a/1.png", "b/2.jpeg"]);
    assert!(pictures.skipped.is_empty());
}

#[cfg(unix)]
#[test]
fn a_link_back_to_a_folder_above_is_not_followed() {
    let root = folder(&[("a/1.png", png(1)), ("b/2.png", png(2))]);
    std::os::unix::fs::symlink(root.path(), root.path().join("a/loop")).unwrap();
    std::os::unix::fs::symlink(root.path().join("nowhere"), root.path().join("dangling.png")).unwrap();
    std::os::unix::fs::symlink(root.path().join("b"), root.path().join("c")).unwrap();
    assert_eq!(load(root.path(), &OPTIONS, |_, _| {}).unwrap().names, ["a/1.png", "b/2.png", "c/2.png"]);
}

#[test]
fn every_format_is_read_whatever_its_name() {
    use ImageFormat::{Bmp, Gif, Ico, Jpeg, Png, Pnm, Qoi, Tiff, WebP};
    for format in [Png, Jpeg, WebP, Gif, Bmp, Tiff, Qoi, Ico, Pnm] {
        let bytes = encode(RgbaImage::from_pixel(4, 4, Rgba([255; 4])).convert(format), format);
        assert_eq!(decode(&bytes, [4, 4], false), [255; 48], "{format:?}");
    }
    // A TGA has no mark: its name says what it is.
    let tga = encode(RgbImage::from_pixel(4, 4, Rgb([9; 3])), ImageFormat::Tga);
    assert_eq!(load_files(&[("a.TGA", tga)], &OPTIONS).unwrap().pixels, [9; 48]);
}

#[test]
fn every_ending_of_a_picture_counts_and_a_name_without_one_is_told_by_content() {
    let jpeg = encode(RgbImage::from_pixel(4, 4, Rgb([2; 3])), ImageFormat::Jpeg);
    let files = [
        ("a/1.JFIF", jpeg.clone()),
        ("a/2.jpe", jpeg),
        ("a/3f786850e387", png(3)),
        ("b/4.tif", encode(RgbImage::from_pixel(4, 4, Rgb([4; 3])), ImageFormat::Tiff)),
        ("b/README", b"no picture".to_vec()),
        ("b/5.json", b"{}".to_vec()),
        ("b/6.json", b"{}".to_vec()),
    ];
    let pictures = load_files(&files, &OPTIONS).unwrap();
    assert_eq!(pictures.names, ["a/1.JFIF", "a/2.jpe", "a/3f786850e387", "b/4.tif"]);
    assert_eq!(pictures.notes, ["passed over other files: 2 .json, 1 without an ending"]);
}

/// Each begins as files of its kind do.
#[test]
fn pictures_of_kinds_that_are_not_read_are_named_and_a_class_of_them_alone_is_an_error() {
    let avif = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1".to_vec();
    let files = [
        ("a/1.png", png(1)),
        ("a/2.avif", avif.clone()),
        ("a/3.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic".to_vec()),
        ("a/4.jxl", b"\xff\x0a\x01\x02".to_vec()),
        ("a/5.nef", encode(RgbImage::new(4, 4), ImageFormat::Tiff)),
        ("a/6.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00".to_vec()),
        ("a/7.jpg", b"<!DOCTYPE html>".to_vec()),
        ("b/8.png", png(8)),
    ];
    let pictures = load_files(&files, &OPTIONS).unwrap();
    assert_eq!(pictures.names, ["a/1.png", "b/8.png"]);
    let kinds = ["is AVIF", "is HEIC", "is JPEG XL", "is a raw photo", "git lfs pull", "the download failed"];
    assert_eq!(pictures.skipped.len(), kinds.len());
    for (skipped, kind) in pictures.skipped.iter().zip(kinds) {
        assert!(skipped.reason.contains(kind), "{}: {}", skipped.name, skipped.reason);
    }
    let lost = [("a/1.png", png(1)), ("b/8.png", png(8)), ("c/2.avif", avif.clone()), ("c/3.avif", avif)];
    check_error(
        &lost,
        &OPTIONS,
        "none of the 2 pictures of class \"c\" can be read; the first is c/2.avif: its content is AVIF",
    );
    let all = load_files(&lost, &DataOptions { unconditional: true, ..OPTIONS }).unwrap();
    assert_eq!((all.len(), all.skipped.len()), (2, 2));
}

#[test]
fn a_set_divided_into_train_and_test_is_asked_about() {
    let files = [("set/test/a/1.png", png(1)), ("set/train/a/2.png", png(2)), ("set/train/b/3.png", png(3))];
    check_error(
        &files,
        &OPTIONS,
        "the folders train and test look like parts of one set, and train/a like no class: give one of them",
    );
    let pictures = load_files(&files, &DataOptions { unconditional: true, ..OPTIONS }).unwrap();
    assert_eq!(pictures.notes, ["the pictures of train and test are taken together"]);
}

#[test]
fn folders_become_a_models_labels_by_their_names() {
    let model = ["animals", "cats/black", "food"].map(String::from);
    let labels = |files: &[(&str, Vec<u8>)], classes: &[String]| {
        load_files(files, &OPTIONS).unwrap().labels_of(Path::new("here"), classes)
    };
    let two = [("food/1.png", png(1)), ("animals/2.png", png(2))];
    assert_eq!(labels(&two, &model).unwrap(), Some(vec![0, 2]));
    // One folder of a class's name is that class, wherever it lies; a folder of another name is no class.
    assert_eq!(labels(&[("food/1.png", png(1)), ("food/2.png", png(2))], &model).unwrap(), Some(vec![2, 2]));
    assert_eq!(labels(&[("set/cats/black/1.png", png(1))], &model).unwrap(), Some(vec![1]));
    assert_eq!(labels(&[("set/1.png", png(1))], &model).unwrap(), None);
    let error = |classes: &[String]| format!("{:#}", labels(&two, classes).unwrap_err());
    assert_eq!(
        error(&model[1..]),
        "here: class \"animals\" is none of the model's (cats/black, food); rename the folders like the classes"
    );
    let foreign = error(&["0", "1"].map(String::from));
    assert!(
        foreign.contains(
            "name them in its dmd.json, in the order of their labels, as {\"classes\": [\"animals\", \"food\"]}"
        ),
        "{foreign}"
    );
}

#[test]
fn only_models_of_one_or_three_channels_are_compared_with_files() {
    assert!(DataOptions::of_model([1, 8, 8], true).unwrap().grey);
    let error = DataOptions::of_model([4, 8, 8], true).unwrap_err().to_string();
    assert!(error.starts_with("the model's pictures have 4 channels"), "{error}");
}

/// Two entries that point at the same bytes, as the bombs do that unpack to petabytes.
#[test]
fn a_zip_whose_entries_overlap_is_refused() {
    let set = zipped(&[("a.png", vec![7; 5000]), ("b.png", vec![7; 5000])]);
    let path = set.path().join("set.zip");
    let mut bytes = fs::read(&path).unwrap();
    // Compressed and whole size of the second entry, as the directory at the end claims them.
    let second = bytes.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    bytes[second + 20..second + 28].copy_from_slice(&[0x88, 0x13, 1, 0, 0x88, 0x13, 1, 0]);
    fs::write(&path, &bytes).unwrap();
    let message = format!("{:#}", load(&path, &OPTIONS, |_, _| {}).unwrap_err());
    assert!(message.contains("they overlap") || message.contains("entry"), "{message}");
}

/// JPEG has no alpha.
trait Convert {
    fn convert(self, format: ImageFormat) -> DynamicImage;
}

impl Convert for RgbaImage {
    fn convert(self, format: ImageFormat) -> DynamicImage {
        let image = DynamicImage::ImageRgba8(self);
        if format == ImageFormat::Jpeg { image.into_rgb8().into() } else { image }
    }
}

#[test]
fn transparency_is_mixed_with_white() {
    // A fifth of blue on white, and clear pixels whose hidden colour must not show, in every kind of PNG.
    assert_eq!(decode(PALETTED, [1, 2], false), [255, 204, 0, 204, 0, 255]);
    let rgba = RgbaImage::from_raw(2, 1, vec![0, 0, 255, 51, 9, 99, 199, 0]).unwrap();
    assert_eq!(decode(&encode(rgba, ImageFormat::Png), [1, 2], false), [204, 255, 204, 255, 255, 255]);
    let rgba16 = ImageBuffer::<Rgba<u16>, _>::from_raw(1, 1, vec![0, 65535, 32768, 13107]).unwrap();
    // 65535 · 4/5 + 32768 / 5 = 58981.6, and 58981.6 / 257 = 229.5 (229.5004), up.
    assert_eq!(decode(&encode(rgba16, ImageFormat::Png), [1, 1], false), [204, 255, 230]);
    let grey_alpha = GrayAlphaImage::from_pixel(1, 1, LumaA([100, 51]));
    assert_eq!(decode(&encode(grey_alpha, ImageFormat::Png), [1, 1], false), [224; 3]);
    let grey16 = ImageBuffer::<Luma<u16>, _>::from_pixel(1, 1, Luma([100 * 257]));
    assert_eq!(decode(&encode(grey16, ImageFormat::Png), [1, 1], true), [100]);
}

#[test]
fn hidden_colour_does_not_bleed_into_edges_when_resized() {
    // The clear half hides black; resized before flattening it would darken the edge.
    let half = RgbaImage::from_fn(64, 64, |x, _| if x < 29 { Rgba([0, 0, 0, 0]) } else { Rgba([255, 255, 255, 255]) });
    assert_eq!(decode(&encode(half, ImageFormat::Png), [4, 4], false), [255; 48]);
}

#[test]
fn the_centre_is_cut_out_and_resized_to_any_shape() {
    // Red, green and blue thirds: the centre third remains. 12 by 36 upright, 36 by 12 lying.
    let thirds = |third: u32| Rgb([[255, 0, 0], [0, 255, 0], [0, 0, 255]][third as usize]);
    let lying = encode(RgbImage::from_fn(36, 12, |x, _| thirds(x / 12)), ImageFormat::Png);
    let upright = encode(RgbImage::from_fn(12, 36, |_, y| thirds(y / 12)), ImageFormat::Png);
    let green = [[0_u8; 16], [255; 16], [0; 16]].concat();
    assert_eq!(decode(&lying, [4, 4], false), green);
    assert_eq!(decode(&upright, [4, 4], false), green);
    assert_eq!(decode(&upright, [24, 24], false), [[0_u8; 576], [255; 576], [0; 576]].concat(), "enlarged too");
    let whole = decode(&lying, [2, 6], false);
    assert_eq!(
        (whole[0], whole[5], whole[12], whole[24 + 5]),
        (255, 0, 0, 255),
        "a shape as the picture's cuts nothing"
    );
    assert_eq!(decode(&encode(RgbImage::new(1, 3000), ImageFormat::Png), [4, 4], false), [0; 48]);
}

#[test]
fn shrinking_does_not_alias() {
    // Stripes of one pixel are grey from afar.
    let stripes = RgbImage::from_fn(64, 64, |x, _| Rgb([if x % 2 == 0 { 0 } else { 255 }; 3]));
    let pixels = decode(&encode(stripes, ImageFormat::Png), [4, 4], false);
    assert!(pixels.iter().all(|value| (118..=138).contains(value)), "{pixels:?}");
}

#[test]
fn a_picture_of_the_right_size_passes_untouched() {
    let noise = RgbImage::from_fn(4, 4, |x, y| Rgb([0, 1, 2].map(|c| (x * 97 + y * 61 + c * 151) as u8)));
    let pixels = decode(&encode(noise.clone(), ImageFormat::Png), [4, 4], false);
    for (x, y, pixel) in noise.enumerate_pixels() {
        let at = |channel: usize| pixels[channel * 16 + (y * 4 + x) as usize];
        assert_eq!([at(0), at(1), at(2)], pixel.0);
    }
}

#[test]
fn grey_is_luma() {
    // Rec. 709: 0.2126 red, 0.7152 green, 0.0722 blue.
    let colours = RgbImage::from_raw(4, 1, vec![255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255]).unwrap();
    assert_eq!(decode(&encode(colours, ImageFormat::Png), [1, 4], true), [54, 182, 18, 255]);
}

#[test]
fn exif_orientation_is_obeyed() {
    let jpeg = encode(RgbImage::from_fn(32, 16, |x, _| Rgb([if x < 16 { 0 } else { 255 }; 3])), ImageFormat::Jpeg);
    // APP1 with one TIFF entry behind the start marker: orientation (0x0112) = 6, turn by 90° clockwise.
    let exif = b"\xff\xe1\x00\x22Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let turned = [&jpeg[..2], exif, &jpeg[2..]].concat();
    let pixels = decode(&turned, [32, 16], true);
    assert!(pixels[..16 * 12].iter().all(|&value| value < 20), "the left half is on top");
    assert!(pixels[16 * 20..].iter().all(|&value| value > 235), "the right half is below");
}

#[test]
fn a_broken_picture_is_left_out_and_named() {
    let jpeg = encode(RgbImage::from_fn(64, 64, |x, y| Rgb([(x * y) as u8; 3])), ImageFormat::Jpeg);
    let files = [
        ("cats/1.png", png(1)),
        ("cats/2.png", png(2)[..50].to_vec()),
        ("cats/3.png", b"not a picture".to_vec()),
        ("cats/4.png", Vec::new()),
        ("dogs/5.png", png(5)),
        ("dogs/6.png", BOMB.to_vec()),
        ("dogs/7.jpg", jpeg[..jpeg.len() / 2].to_vec()),
    ];
    let pictures = load_files(&files, &OPTIONS).unwrap();
    assert_eq!(pictures.names, ["cats/1.png", "dogs/5.png"]);
    assert_eq!(pictures.pixels, [[1_u8; 48], [5; 48]].concat());
    assert_eq!(
        (pictures.classes.as_slice(), pictures.labels.as_slice()),
        (&["cats".into(), "dogs".into()][..], &[0, 1][..])
    );
    let skipped: Vec<&str> = pictures.skipped.iter().map(|skipped| skipped.name.as_str()).collect();
    assert_eq!(skipped, ["cats/2.png", "cats/3.png", "cats/4.png", "dogs/6.png", "dogs/7.jpg"]);
    assert!(pictures.skipped[1].reason.contains("no picture of a kind that is read"), "{:?}", pictures.skipped);
    assert!(pictures.skipped[3].reason.contains("limit"), "{:?}", pictures.skipped);

    let first = "5 of 7 pictures cannot be read; the first is cats/2.png: ";
    check_error(&files, &DataOptions { strict: true, ..OPTIONS }, first);
    check_error(&files[1..4], &OPTIONS, "3 of 3 pictures cannot be read; the first is cats/2.png: ");
}

#[test]
fn a_damaged_zip_entry_is_left_out() {
    let set = zipped(&[("a.png", png(1)), ("b.png", png(2))]);
    let path = set.path().join("set.zip");
    let mut bytes = fs::read(&path).unwrap();
    let stored = png(1);
    let start = bytes.windows(stored.len()).position(|window| window == stored).unwrap();
    bytes[start + stored.len() / 2] ^= 0xff;
    fs::write(&path, &bytes).unwrap();
    let pictures = load(&path, &OPTIONS, |_, _| {}).unwrap();
    assert_eq!((pictures.names.as_slice(), pictures.skipped[0].name.as_str()), (&["b.png".into()][..], "a.png"));
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let message = format!("{:#}", load(&path, &OPTIONS, |_, _| {}).unwrap_err());
    assert!(message.contains("set.zip: expected a folder or a zip"), "{message}");
}

#[test]
fn a_path_without_pictures_is_an_error_that_says_what_is_there() {
    check_error(&[], &OPTIONS, "found nothing");
    check_error(&[("b.txt", vec![]), ("a.csv", vec![])], &OPTIONS, "no pictures; expected png, apng, jpg");
    let check = |path: &Path, options: &DataOptions, expected: &str| {
        let message = format!("{:#}", load(path, options, |_, _| {}).unwrap_err());
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    };
    let set = folder(&[("a.png", png(1))]);
    check(
        &set.path().join("a.png"),
        &OPTIONS,
        "a.png: expected a folder or a zip of pictures, found a file that is no zip",
    );
    check(&set.path().join("none"), &OPTIONS, "none: cannot read");
    check(
        set.path(),
        &DataOptions { size: [0, 4], ..OPTIONS },
        "picture size 0x4: height and width must be at least 1",
    );
    check(set.path(), &DataOptions { size: [1 << 31, 1 << 31], ..OPTIONS }, "1 pictures at 2147483648x2147483648");
}

#[test]
fn split_is_complete_repeatable_and_differs_with_the_seed() {
    let names: Vec<String> = (0..1000).map(|index| format!("{index}.png")).collect();
    let pictures = Pictures { pixels: vec![0; 1000], names, channels: 1, height: 1, width: 1, ..Pictures::default() };
    let (train, held_out) = pictures.split(0.1, 7);
    assert_eq!((train.len(), held_out.len()), (900, 100));
    let mut all = [train.clone(), held_out.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (0..1000).collect::<Vec<_>>());
    assert_eq!(pictures.split(0.1, 7), (train, held_out.clone()));
    assert_ne!(pictures.split(0.1, 8).1, held_out);
    // Spread over the whole set: the mean of 100 indices is within three standard errors of 499.5.
    assert!((held_out.iter().sum::<usize>() as f64 / 100.0 - 499.5).abs() < 87.0);
    assert_eq!(pictures.split(0.0, 7).1.len(), 0);
    assert_eq!(pictures.split(1e-9, 7).1.len(), 1);
    assert_eq!(pictures.split(0.999_999, 7).0.len(), 1);
}

#[test]
fn batch_scales_mirrors_and_labels() {
    let picture =
        |values: [u8; 2]| encode(RgbImage::from_fn(2, 1, |x, _| Rgb([values[x as usize]; 3])), ImageFormat::Png);
    let files = [("a/1.png", picture([0, 255])), ("b/2.png", picture([51, 204]))];
    let pictures = load_files(&files, &DataOptions { size: [1, 2], ..OPTIONS }).unwrap();
    let (images, labels) = pictures.batch(&[1, 0, 0], &[false, false, true]);
    assert_eq!(labels, [1, 0, 0]);
    let expected = [[-0.6, 0.6].repeat(3), [-1.0, 1.0].repeat(3), [1.0, -1.0].repeat(3)].concat();
    assert!(images.iter().zip(&expected).all(|(x, y): (&f32, &f32)| (x - y).abs() < 1e-6), "{images:?}");
}
