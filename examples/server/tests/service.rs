//! The service on a port of its own, with the runtime's fixture of three classes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use dmd_runtime::{Generator, Label, Options, Request};
use dmd_server::{Limits, app};

fn generator() -> Option<Generator> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../runtime/tests/fixtures/classes-f32.onnx");
    match Generator::load(file, Options { threads: Some(1), ..Options::default() }) {
        Ok(generator) => Some(generator),
        Err(dmd_runtime::Error::NoLibrary { .. }) => {
            eprintln!("SKIPPED: there is no ONNX Runtime here");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

async fn served(limits: Limits) -> Option<(Generator, SocketAddr)> {
    let (expected, service) = (generator()?, app(generator()?, limits).unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, service).await.unwrap() });
    Some((expected, address))
}

fn begun(address: SocketAddr, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    stream
}

/// The status and the body.
fn get(address: SocketAddr, path: &str) -> (u16, Vec<u8>) {
    let mut answer = Vec::new();
    begun(address, path).read_to_end(&mut answer).unwrap();
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    (std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap(), answer.split_off(body))
}

fn metric(address: SocketAddr, name: &str) -> u64 {
    let text = String::from_utf8(get(address, "/metrics").1).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap();
    line.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_are_the_generators_own_however_many_ask_at_once() {
    let Some((generator, address)) = served(Limits::default()).await else { return };
    let names = generator.info().classes.clone();
    let asked: Vec<_> = (0..40u64).map(|i| (i, i as usize % names.len())).collect();
    let threads: Vec<_> = asked
        .iter()
        .map(|&(seed, label)| {
            let path = format!("/picture.png?seed={seed}&class={label}");
            tokio::task::spawn_blocking(move || get(address, &path))
        })
        .collect();
    for (thread, (seed, label)) in threads.into_iter().zip(asked) {
        let (status, png) = thread.await.unwrap();
        let request = Request { seed, labels: vec![Label::Index(label)], ..Request::default() };
        let expected = generator.generate(&request).unwrap().iter().next().unwrap().to_png().unwrap();
        assert!((status, png) == (200, expected), "seed {seed}");
    }
    let (status, text) = get(address, "/picture.png?class=unicorn");
    assert_eq!(status, 400);
    assert!(String::from_utf8(text).unwrap().contains("there is no class \"unicorn\", expected one of"));
    for path in ["/picture.png?seed=-1", "/picture.png?sed=1", "/picture.png?class=9"] {
        assert_eq!(get(address, path).0, 400, "{path}");
    }
    assert_eq!(get(address, "/other").0, 404);
    let (status, page) = get(address, "/");
    assert!(status == 200 && String::from_utf8(page).unwrap().contains(&format!("<option>{}</option>", names[0])));
    assert_eq!(metric(address, "dmd_requests_answered_total"), 40);
    assert!(metric(address, "dmd_calls_total") <= metric(address, "dmd_pictures_total"));
}

/// More ask than may wait: each gets a picture or is told to come again, and at the end all is as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_row_refuses_and_clients_that_go_away_cost_nothing() {
    let Some((_, address)) = served(Limits { waiting: 1, ..Limits::default() }).await else { return };
    let threads: Vec<_> = (0..64)
        .map(|seed| tokio::task::spawn_blocking(move || get(address, &format!("/picture.png?seed={seed}")).0))
        .collect();
    let mut answered = 0;
    for thread in threads {
        match thread.await.unwrap() {
            200 => answered += 1,
            other => assert_eq!(other, 503),
        }
    }
    assert!(answered > 0);
    assert_eq!(metric(address, "dmd_requests_answered_total"), answered);
    assert_eq!(metric(address, "dmd_requests_refused_total"), 64 - answered);
    (0..64).for_each(|seed| drop(begun(address, &format!("/picture.png?seed={seed}"))));
    let started = Instant::now();
    while get(address, "/picture.png").0 != 200 {
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
