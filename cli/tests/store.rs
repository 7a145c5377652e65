//! Checkpoints in object stores: a real S3 server (`s3s-fs`), which can be told to refuse or to throttle.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{World, text};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, HttpError, HttpResponse};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const KEY: &str = "AKIDTEST";
const SECRET: &str = "not-a-secret";
/// The settings of all runs: a schedule that does not depend on the end, and an embedding that is uploaded in
/// parts.
const SET: [&str; 5] = [
    "--quiet",
    "--nodes=1",
    "--set=model.vocabulary=80000",
    "--set=training.schedule={ kind = \"inverse_square_root\", rate = 0.01, constant_steps = 100 }",
    "--set=checkpoint.every=2",
];

/// An S3 server on a folder with the bucket `runs`.
struct Server {
    address: SocketAddr,
    trouble: Arc<Trouble>,
    _runtime: tokio::runtime::Runtime,
}

/// What the server does instead of answering.
#[derive(Default)]
struct Trouble {
    /// Requests that are refused.
    refusals: AtomicUsize,
    /// Whether blobs are refused.
    refuses_blobs: AtomicBool,
    /// Requests that are told to slow down.
    throttled: AtomicUsize,
}

impl Trouble {
    fn take(counter: &AtomicUsize) -> bool {
        counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    }

    fn answer(&self, path: &str) -> Option<HttpResponse> {
        let refuses_blobs = self.refuses_blobs.load(Ordering::SeqCst);
        let (status, code) = match () {
            () if Self::take(&self.throttled) => (503, "SlowDown"),
            () if refuses_blobs && path.contains("/blobs/") => (403, "AccessDenied"),
            () if Self::take(&self.refusals) => (403, "AccessDenied"),
            () => return None,
        };
        let body = format!("<?xml version=\"1.0\"?>\n<Error><Code>{code}</Code></Error>");
        let mut response = HttpResponse::new(Body::from(body));
        *response.status_mut() = status.try_into().expect("a status");
        Some(response)
    }
}

impl Server {
    fn start(folder: &Path) -> Self {
        fs::create_dir_all(folder.join("runs")).expect("a bucket");
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder).expect("a folder"));
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let (service, trouble) = (builder.build(), Arc::new(Trouble::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(serve(listener, service, Arc::clone(&trouble)));
        Self { address, trouble, _runtime: runtime }
    }

    /// A command that finds the server.
    fn reached_by<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("AWS_ENDPOINT_URL", format!("http://{}", self.address))
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET)
    }

    /// A run; its standard error, and whether it succeeded.
    fn train(&self, world: &World, args: &[&str]) -> (bool, String) {
        let mut command = world.train(&[&SET[..], args].concat());
        let output = self.reached_by(&mut command).output().expect("the binary");
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(!said.contains("panicked"), "{said}");
        (output.status.success(), said)
    }
}

async fn serve(listener: tokio::net::TcpListener, service: S3Service, trouble: Arc<Trouble>) {
    loop {
        let Ok((socket, _)) = listener.accept().await else { return };
        let (service, trouble) = (service.clone(), Arc::clone(&trouble));
        let answer = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let (service, answer) = (service.clone(), trouble.answer(request.uri().path()));
            async move {
                match answer {
                    Some(answer) => Ok::<_, HttpError>(answer),
                    None => service.call(request.map(Body::from)).await,
                }
            }
        });
        tokio::spawn(async move {
            let connection = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            // A client that goes away is no failure.
            let _ = connection.serve_connection(TokioIo::new(socket), answer).await;
        });
    }
}

fn files(folder: &Path) -> Vec<String> {
    let entries =
        fs::read_dir(folder).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let mut names: Vec<String> =
        entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    names
}

const STORE: &str = "--set=checkpoint.store=\"s3://runs/one\"";

#[test]
fn a_run_whose_disk_is_gone_resumes_from_the_bucket_with_the_same_bits() {
    let world = World::new();
    let bucket = world.path("bucket");
    let server = Server::start(&bucket);
    let (ok, said) = server.train(&world, &["--set=training.steps=12", "--dir=runs/whole"]);
    assert!(ok, "{said}");

    // The store throttles at the beginning, and again later.
    server.trouble.throttled.store(3, Ordering::SeqCst);
    let (ok, said) = server
        .train(&world, &[STORE, "--set=training.steps=5", "--set=checkpoint.keep=1", "--dir=runs/lost"]);
    assert!(ok, "{said}\n{}", world.logs());
    assert_eq!(server.trouble.throttled.load(Ordering::SeqCst), 0);
    // What is kept there is what is kept here: the newest, and the one that all replicas agreed on.
    let one = bucket.join("runs/one");
    for folder in ["checkpoints", "blobs"] {
        assert_eq!(files(&one.join(folder)), files(&world.path("runs/lost").join(folder)), "{folder}");
    }
    let events = fs::read_to_string(world.path("runs/lost/events.jsonl")).expect("events");
    assert!(events.contains("\"checkpoint_copied\",\"step\":5"), "{events}");
    fs::remove_dir_all(world.path("runs/lost")).expect("a folder");

    // Another machine.
    let elsewhere = World::new();
    let resumed = ["--set=training.steps=12", "--dir=runs/found", "--resume", "--from=s3://runs/one"];
    let (ok, said) = server.train(&elsewhere, &[&[STORE], &resumed[..]].concat());
    assert!(ok && said.contains("step 5 from s3://runs/one"), "{said}\n{}", elsewhere.logs());
    assert_eq!(elsewhere.digest("found"), world.digest("whole"));
    assert_eq!(files(&one.join("checkpoints")).last().map(String::as_str), Some("step-00000012.json"));

    // A run that starts over must not replace what is there, and neither must another run.
    for (more, part) in [
        ("--set=run.name=\"tiny\"", "it has a checkpoint of step 12"),
        ("--set=run.seed=9", "run tiny with other options"),
    ] {
        let (ok, said) = server.train(&world, &[STORE, more, "--dir=runs/other"]);
        assert!(!ok && said.contains(part) && said.contains("s3://runs/one"), "{said}");
    }
    let (ok, said) = server.train(&world, &[&[STORE, "--set=run.seed=9"], &resumed[..]].concat());
    assert!(!ok && said.contains("s3://runs/one holds another run: run.seed was 5, now 9"), "{said}");
}

#[test]
fn a_bucket_that_refuses_stops_a_start_and_never_a_run() {
    let world = World::new();
    let server = Server::start(&world.path("bucket"));
    let refuse = |count| server.trouble.refusals.store(count, Ordering::SeqCst);
    refuse(usize::MAX);
    let (ok, said) = server.train(&world, &[STORE, "--dir=runs/refused"]);
    assert!(!ok && said.contains("s3://runs/one") && said.contains("the store refuses access"), "{said}");
    let (ok, said) = server.train(&world, &["--resume", "--from=s3://runs/one", "--dir=runs/none"]);
    assert!(!ok && said.contains("refuses access"), "{said}");
    assert!(!world.path("runs/none").exists());

    refuse(0);
    let (ok, said) =
        server.train(&world, &["--set=checkpoint.store=\"s3://nowhere/one\"", "--dir=runs/gone"]);
    assert!(!ok && said.contains("s3://nowhere/one"), "{said}");
    let (ok, said) = server.train(&world, &["--set=checkpoint.store=\"runs/one\"", "--dir=runs/wrong"]);
    assert!(!ok && said.contains("\"runs/one\": expected s3://"), "{said}");

    let (ok, said) = server.train(&world, &["--set=checkpoint.store=\"http://h/one\"", "--dir=runs/read"]);
    assert!(!ok && said.contains("http://h/one: it can only be read"), "{said}");

    // It works at the start, and refuses from then on: the run goes on without copies, and says so.
    server.trouble.refuses_blobs.store(true, Ordering::SeqCst);
    let (ok, said) = server.train(&world, &[STORE, "--dir=runs/late"]);
    assert!(ok, "{said}\n{}", world.logs());
    let events = fs::read_to_string(world.path("runs/late/events.jsonl")).expect("events");
    assert!(events.contains("checkpoint_not_copied"), "{events}");
    assert_eq!(world.metrics("late").len(), 6);
}
