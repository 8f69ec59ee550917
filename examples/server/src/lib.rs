//! Pictures of an exported file by HTTP: what a service needs around `dmd_runtime::Generator`, and no more. A queue with an
//! end, calls that make the pictures of all who wait, clients that went away left out, limits, and counters.
//!
//! - `GET /`: a page with pictures
//! - `GET /picture.png?seed=7&class=star`: one picture; 400 for a class that there is not, 503 when too many wait
//! - `GET /metrics`: counters as Prometheus reads them
//!
//! TLS, names and slow clients are a reverse proxy's.

mod metrics;
mod queue;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use dmd_runtime::{Generator, Watch};
use serde::Deserialize;
use tokio::sync::oneshot;
use tokio::time::timeout;

pub use metrics::Metrics;
pub use queue::Limits;
use queue::{Job, Queue};

/// The routes, and the thread that makes pictures; it ends when the routes are dropped.
pub fn app(generator: Generator, limits: Limits) -> anyhow::Result<Router> {
    let generator = Arc::new(generator);
    let metrics = Arc::new(Metrics::default());
    let queue = Queue::start(generator.clone(), metrics.clone(), limits)?;
    let service = Arc::new(Service { page: page(&generator), generator, queue, metrics, patience: limits.patience });
    Ok(Router::new()
        .route("/", get(|State(service): State<Arc<Service>>| async move { Html(service.page.clone()) }))
        .route("/picture.png", get(picture))
        .route("/metrics", get(|State(service): State<Arc<Service>>| async move { service.metrics.text() }))
        .with_state(service))
}

struct Service {
    page: String,
    generator: Arc<Generator>,
    queue: Queue,
    metrics: Arc<Metrics>,
    patience: Duration,
}

/// Which picture.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    #[serde(default)]
    seed: u64,
    /// A class by its name or its number; the first one where none is asked for.
    class: Option<String>,
}

/// Ends a request with the client: axum drops what waits for an answer when nobody takes it any more.
struct Interest(Watch);

impl Drop for Interest {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

async fn picture(State(service): State<Arc<Service>>, Query(asked): Query<Asked>) -> Response {
    let begun = Instant::now();
    let label = match label(&service.generator, asked.class.as_deref()) {
        Ok(label) => label,
        Err(reason) => return refusal(StatusCode::BAD_REQUEST, reason),
    };
    let interest = Interest(Watch::new());
    let (reply, answer) = oneshot::channel();
    let job = Job { seed: asked.seed, label, watch: interest.0.clone(), reply };
    if !service.queue.take(job) {
        service.metrics.refused();
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "too many wait already");
    }
    match timeout(service.patience, answer).await {
        Ok(Ok(Ok(png))) => {
            service.metrics.answered(begun.elapsed());
            // The same seed makes the same picture for ever.
            let headers = [(header::CONTENT_TYPE, "image/png"), (header::CACHE_CONTROL, "public, max-age=86400")];
            (headers, png).into_response()
        }
        Ok(Ok(Err(reason))) => refusal(StatusCode::INTERNAL_SERVER_ERROR, reason),
        Ok(Err(_)) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the thread that makes pictures has ended"),
        Err(_) => {
            service.metrics.refused();
            refusal(StatusCode::SERVICE_UNAVAILABLE, "it took too long")
        }
    }
}

fn refusal(status: StatusCode, reason: impl Into<String>) -> Response {
    let retry = (status == StatusCode::SERVICE_UNAVAILABLE).then_some([(header::RETRY_AFTER, "1")]);
    (status, retry, reason.into() + "\n").into_response()
}

fn label(generator: &Generator, class: Option<&str>) -> Result<usize, String> {
    let info = generator.info();
    let n = info.classes.len();
    let Some(class) = class else { return Ok(0) };
    let number = || class.parse::<usize>().ok().filter(|label| *label < n);
    let label = info.class(class).or_else(number);
    label.ok_or_else(|| format!("there is no class {class:?}, expected one of {}", info.classes.join(", ")))
}

/// A page with a few pictures of every class.
fn page(generator: &Generator) -> String {
    let escaped = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
    let options: String = generator.info().classes.iter().map(|c| format!("<option>{}</option>", escaped(c))).collect();
    include_str!("gallery.html").replace("<!-- classes -->", &options)
}
