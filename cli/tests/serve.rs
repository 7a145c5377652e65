//! The HTTP server of a trained model, as its clients see it.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{Guard, World, python_with, text, until, volary};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// A run with room for long texts, whose model has seen a few steps.
static TRAINED: LazyLock<World> = LazyLock::new(|| {
    let world = World::new();
    let set =
        ["--set", "training.steps=6", "--set", "training.sequence_length=400", "--nodes", "1", "--quiet"];
    world.run_train(&set);
    world
});

/// A server that ends with the test.
struct Server {
    _process: Guard,
    address: String,
}

impl Server {
    fn start(more: &[&str]) -> Self {
        Self::of(&TRAINED, more)
    }

    fn of(world: &World, more: &[&str]) -> Self {
        let mut command = volary();
        command.current_dir(world.dir.path()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.args(["serve", "--run", "runs/tiny", "--http", "127.0.0.1:0", "--threads", "1"]).args(more);
        let mut process = Guard(command.spawn().expect("the binary"));
        let mut line = String::new();
        let output = process.0.stdout.take().expect("a pipe");
        BufReader::new(output).read_line(&mut line).expect("a line");
        let address = line.split("http://").nth(1).and_then(|rest| rest.split('/').next());
        Self { _process: process, address: address.expect(&line).to_owned() }
    }

    /// A connection with a request, whose answer has not been read.
    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        // HTTP 1.0: the answer ends with the connection.
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.0\r\n{headers}Content-Length: {length}\r\n\r\n{body}")
            .expect("sent");
        stream
    }

    /// The status and the body of an answer.
    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        let mut answer = String::new();
        self.send(method, path, headers, body).read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    fn complete(&self, request: &Value) -> (u16, Value) {
        let (status, body) = self.ask("POST", "/v1/completions", "", &request.to_string());
        (status, serde_json::from_str(&body).expect("JSON"))
    }

    /// The texts of a request that succeeds, by index.
    fn texts(&self, request: &Value) -> Vec<String> {
        let (status, body) = self.complete(request);
        assert_eq!(status, 200, "{body}");
        let choices = body["choices"].as_array().expect("choices");
        assert!(choices.iter().enumerate().all(|(at, choice)| choice["index"] == at), "{body}");
        choices.iter().map(|choice| choice["text"].as_str().expect("a text").to_owned()).collect()
    }
}

#[test]
fn a_completion_is_what_generate_prints() {
    let server = Server::start(&[]);
    let args = [
        "generate",
        "--run",
        "runs/tiny",
        "--prompt",
        "the lane",
        "--max-tokens",
        "20",
        "--temperature",
        "0",
        "--threads",
        "1",
    ];
    let printed = volary().current_dir(TRAINED.dir.path()).args(args).output().expect("the binary");
    let request =
        json!({ "prompt": "the lane", "max_tokens": 20, "temperature": 0, "model": "tiny", "echo": true });
    let (_, body) = server.complete(&request);
    assert_eq!(format!("{}\n", body["choices"][0]["text"].as_str().expect("a text")), text(&printed.stdout));
    let completion = body["usage"]["completion_tokens"].as_u64().expect("a number");
    let prompt = body["usage"]["prompt_tokens"].as_u64().expect("a number");
    assert_eq!(body["usage"]["total_tokens"], completion + prompt);
    let finish = if completion == 20 { "length" } else { "stop" };
    assert_eq!(body["choices"][0]["finish_reason"], finish);
}

#[test]
fn the_parts_of_a_stream_are_the_whole() {
    let server = Server::start(&[]);
    let request = json!({ "prompt": ["a step", "the"], "max_tokens": 30, "seed": 4, "n": 2, "echo": true, "logprobs": 1 });
    let whole = server.texts(&request);
    assert_eq!(whole, server.texts(&request), "the same seed draws another text");
    let mut streamed = request;
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({ "include_usage": true });
    let (status, body) = server.ask("POST", "/v1/completions", "", &streamed.to_string());
    assert_eq!(status, 200);
    let mut parts: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(parts.pop(), Some("[DONE]"));
    let mut texts = vec![String::new(); 4];
    let mut tokens = 0;
    let parts: Vec<Value> = parts.iter().map(|part| serde_json::from_str(part).expect("JSON")).collect();
    let (usage, parts) = parts.split_last().expect("parts");
    for part in parts {
        let choice = &part["choices"][0];
        let index = choice["index"].as_u64().expect("an index") as usize;
        texts[index].push_str(choice["text"].as_str().expect("a text"));
        tokens += choice["logprobs"]["tokens"].as_array().expect("tokens").len();
    }
    assert_eq!(texts, whole);
    let number = |key: &str| usage["usage"][key].as_u64().expect("a number") as usize;
    // The tokens of each prompt are reported with both of its choices.
    assert_eq!(tokens, 2 * number("prompt_tokens") + number("completion_tokens"));
}

#[test]
fn log_probabilities_belong_to_the_tokens_of_the_text() {
    let server = Server::start(&[]);
    let request = json!({ "prompt": "every expert adds", "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": true });
    let (_, body) = server.complete(&request);
    let choice = &body["choices"][0];
    let list = |key: &str| choice["logprobs"][key].as_array().expect("a list").clone();
    let tokens: String = list("tokens").iter().map(|token| token.as_str().expect("a token")).collect();
    assert_eq!(tokens, choice["text"].as_str().expect("a text"));
    let (own, top) = (list("token_logprobs"), list("top_logprobs"));
    assert!(own[0].is_null() && top[0].is_null(), "{choice}");
    assert!(own[1..].iter().all(|p| p.as_f64().is_some_and(|p| p <= 0.0)), "{choice}");
    // The last token is the most likely one.
    let best = top.last().and_then(Value::as_object).expect("the most likely tokens").values();
    let best = best.filter_map(Value::as_f64).fold(f64::NEG_INFINITY, f64::max);
    assert_eq!(own.last().and_then(Value::as_f64), Some(best), "{choice}");
    let offsets: Vec<u64> = list("text_offset").iter().filter_map(Value::as_u64).collect();
    assert!(offsets[0] == 0 && offsets.is_sorted(), "{offsets:?}");
    // No new token, as evaluations ask for it.
    let none = json!({ "prompt": "every expert adds", "max_tokens": 0, "logprobs": 1, "echo": true });
    assert_eq!(server.texts(&none), ["every expert adds"]);
}

#[test]
fn a_request_that_cannot_be_served_is_one_error_with_its_parameter() {
    let server = Server::start(&[]);
    for (request, status, param, part) in [
        (json!({}), 400, "prompt", "is missing"),
        (json!({ "prompt": 5 }), 400, "prompt", "expected a string"),
        (json!({ "prompt": [] }), 400, "prompt", "without tokens"),
        (json!({ "prompt": [400] }), 400, "prompt", "token 400"),
        (json!({ "prompt": "x", "max_tokens": 400 }), 400, "max_tokens", "context is 400 tokens"),
        (json!({ "prompt": "x", "model": "gpt-4" }), 404, "model", "gpt-4"),
        (json!({ "prompt": "x", "n": 0 }), 400, "n", "1 to 128"),
        (json!({ "prompt": vec!["x"; 65], "n": 2 }), 400, "prompt", "at most 128 in all"),
        (json!({ "prompt": "x", "temperature": -0.5 }), 400, "temperature", "-0.5"),
        (json!({ "prompt": "x", "top_p": 2 }), 400, "top_p", "0 to 1"),
        (json!({ "prompt": "x", "stop": [""] }), 400, "stop", "none of them empty"),
        (json!({ "prompt": "x", "logprobs": 21 }), 400, "logprobs", "0 to 20"),
        (json!({ "prompt": "x", "suffix": "y" }), 400, "suffix", "not supported"),
        (json!({ "prompt": "x", "presence_penalty": 3 }), 400, "presence_penalty", "-2 to 2"),
    ] {
        let (found, body) = server.complete(&request);
        let error = &body["error"];
        assert_eq!((found, error["param"].as_str()), (status, Some(param)), "{request}: {body}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(part)), "{request}: {body}");
    }
    for (method, path, body, status, part) in [
        ("POST", "/v1/completions", "{\"prompt\": ", 400, "not JSON"),
        (
            "POST",
            "/v1/completions",
            "{\"prompt\": \"x\", \"max_tokens\": \"y\"}",
            400,
            "max_tokens: invalid type",
        ),
        ("GET", "/v1/completions", "", 405, "another method"),
        ("POST", "/v1/chat/completions", "{}", 404, "no such path"),
        ("GET", "/v1/models/other", "", 404, "other"),
    ] {
        let (found, answer) = server.ask(method, path, "", body);
        let error: Value = serde_json::from_str(&answer).expect("JSON");
        let message = error["error"]["message"].as_str().expect("a message");
        assert!(found == status && message.contains(part), "{method} {path} {body}: {found} {answer}");
    }
    let (found, _) = server.ask("POST", "/v1/completions", "", &"x".repeat((4 << 20) + 1));
    assert_eq!(found, 413);
    assert_eq!(server.ask("GET", "/health", "", "").0, 200);
    assert!(server.ask("GET", "/v1/models", "", "").1.contains("\"tiny\""));
}

#[test]
fn beyond_localhost_an_access_token_is_required() {
    let refused = volary()
        .current_dir(TRAINED.dir.path())
        .args(["serve", "--run", "runs/tiny", "--http", "0.0.0.0:0"])
        .output()
        .expect("the binary");
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("add --token-file"), "{}", text(&refused.stderr));
    std::fs::write(TRAINED.path("token"), "secret\n").expect("a file");
    let server = Server::start(&["--token-file", "token"]);
    let with = |token: &str| server.ask("GET", "/v1/models", token, "").0;
    assert_eq!(with(""), 401);
    assert_eq!(with("Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(with("Authorization: Bearer secret\r\n"), 200);
    assert_eq!(server.ask("GET", "/health", "", "").0, 200);
}

#[test]
fn a_client_that_leaves_frees_its_slot() {
    let server = Server::start(&["--parallel", "1"]);
    let long = json!({ "prompt": "the", "max_tokens": 390, "n": 128, "temperature": 5, "stream": true });
    let mut leaver = server.send("POST", "/v1/completions", "", &long.to_string());
    let mut first = [0; 200];
    leaver.read_exact(&mut first).expect("a part");
    drop(leaver);
    // All 128 continuations would take minutes.
    let began = Instant::now();
    server.texts(&json!({ "prompt": "a", "max_tokens": 2 }));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn many_clients_at_once_get_what_each_gets_alone_and_idle_ones_keep_nobody_out() {
    let server = Server::start(&["--parallel", "8"]);
    let idle: Vec<TcpStream> = (0..600).filter_map(|_| TcpStream::connect(&server.address).ok()).collect();
    assert!(idle.len() > 500, "{} connections", idle.len());
    let request =
        |n: usize| json!({ "prompt": "step ".repeat(1 + n % 5), "max_tokens": 10 + n, "temperature": 0 });
    let alone: Vec<_> = (0..5).map(|n| server.texts(&request(n))).collect();
    std::thread::scope(|scope| {
        for client in 0..40 {
            let (server, alone) = (&server, &alone);
            scope.spawn(move || assert_eq!(server.texts(&request(client % 5)), alone[client % 5]));
        }
    });
}

#[test]
fn each_checkpoint_of_a_living_run_is_taken_without_dropping_a_request() {
    let world = World::new();
    let set =
        ["--set", "training.steps=120", "--set", "checkpoint.every=20", "--nodes", "1", "--threads", "1"];
    let mut run =
        Guard::start(&mut world.train(&[&set[..], &["--set", "training.sequence_length=96"]].concat()));
    let checkpoints = world.path("runs/tiny/checkpoints");
    let has_checkpoint = || std::fs::read_dir(&checkpoints).is_ok_and(|mut entries| entries.next().is_some());
    until("a checkpoint", Duration::from_secs(60), has_checkpoint);
    let server = Server::of(&world, &["--follow"]);
    let steps = Mutex::new(BTreeSet::new());
    let ask = || {
        let request = json!({ "prompt": "the lane", "max_tokens": 60, "temperature": 1 });
        let (status, body) = server.complete(&request);
        assert_eq!(status, 200, "{body}");
        let step = body["system_fingerprint"].as_str().and_then(|step| step.strip_prefix("step-"));
        let step: u64 = step.and_then(|step| step.parse().ok()).expect("a step");
        steps.lock().insert(step);
        step
    };
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| until("the last checkpoint", Duration::from_secs(120), || ask() == 120));
        }
        assert!(run.wait(Duration::from_secs(120)).success(), "{}", world.logs());
    });
    let steps = steps.into_inner();
    assert!(steps.len() >= 3 && steps.iter().all(|step| step % 20 == 0), "{steps:?}");
    let (_, metrics) = server.ask("GET", "/metrics", "", "");
    assert!(metrics.contains("volary_server_step 120"), "{metrics}");
    assert!(metrics.contains("volary_server_answers_total{status=\"200\"}"), "{metrics}");
    assert!(metrics.contains("volary_server_continuations 0"), "{metrics}");
}

#[test]
fn the_page_gets_the_experts_of_every_token() {
    let server = Server::start(&[]);
    let (status, page) = server.ask("GET", "/", "", "");
    assert!(status == 200 && page.contains("/v1/completions"), "{page}");
    let request =
        json!({ "prompt": "the lane", "max_tokens": 5, "echo": true, "logprobs": 1, "experts": true });
    let (_, body) = server.complete(&request);
    let choice = &body["choices"][0];
    let (tokens, experts) = (&choice["logprobs"]["tokens"], choice["experts"].as_array().expect("experts"));
    // The model has not read the last token.
    assert_eq!(experts.len() + 1, tokens.as_array().expect("tokens").len());
    let is_pair = |pair: &Value| pair[0] != pair[1] && pair[0].as_u64().is_some_and(|expert| expert < 6);
    for layers in experts {
        // Two of the four layers have experts.
        let layers = layers.as_array().expect("layers");
        assert!(layers.len() == 2 && layers.iter().all(is_pair), "{choice}");
    }
}

/// OpenAI's own client, in Python.
#[test]
fn the_openai_client_is_served() {
    let Some(python) = python_with("openai") else { return };
    let server = Server::start(&[]);
    let program = r#"
import openai, sys
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
assert [model.id for model in client.models.list()] == ["tiny"]
ask = dict(model="tiny", prompt="the lane", max_tokens=8, temperature=0)
whole = client.completions.create(logprobs=2, **ask)
assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens)
parts = "".join(part.choices[0].text for part in client.completions.create(stream=True, **ask))
assert parts == whole.choices[0].text, (parts, whole)
for bad, kind in [(dict(model="no"), openai.NotFoundError), (dict(max_tokens=1000), openai.BadRequestError)]:
    try:
        client.completions.create(**{**ask, **bad})
        raise SystemExit(f"{bad} succeeded")
    except kind as error:
        assert error.body["message"], error
print("served")
"#;
    let url = format!("http://{}/v1", server.address);
    let output = Command::new(python).args(["-c", program, &url]).output().expect("python");
    assert_eq!(text(&output.stdout), "served\n", "{}", text(&output.stderr));
}

/// A task of three questions in a folder, for `volary eval` and for the harness.
fn write_task(folder: &Path) {
    std::fs::create_dir_all(folder).expect("a folder");
    let record = |prompt: &str, choices: [&str; 3], answer: usize| {
        json!({ "prompt": prompt, "choices": choices, "answer": answer }).to_string() + "\n"
    };
    let records = [
        record("every expert adds its share", ["of tokens", "to the shard", "zebra crossing"], 0),
        record("the lane runs a step and", ["x", "every node", "the quick links while training"], 1),
        record("Sends them", ["over", "under the naïve café", "training"], 2),
    ];
    let data = folder.join("words.jsonl");
    std::fs::write(&data, records.concat()).expect("a file");
    let task = format!(
        "task: words\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {}}}\ntest_split: test\n\
         output_type: multiple_choice\ndoc_to_text: \"{{{{prompt}}}}\"\ndoc_to_target: \"{{{{answer}}}}\"\n\
         doc_to_choice: \"{{{{choices}}}}\"\n",
        data.display()
    );
    std::fs::write(folder.join("words.yaml"), task).expect("a file");
}

/// The log-likelihoods of the right choices by the lm-evaluation-harness.
fn by_harness(python: &str, server: &Server, tokenizer: &Path, tasks: &Path) -> Vec<f64> {
    let model = format!(
        "model=tiny,base_url=http://{}/v1/completions,tokenizer={},max_length=400",
        server.address,
        tokenizer.display()
    );
    let mut harness = Command::new(python);
    // Without a place for its caches in the user's home, and without a look into the network.
    harness.env("HF_HUB_OFFLINE", "1").env("HF_HOME", TRAINED.path("huggingface"));
    harness.args([
        "-m",
        "lm_eval",
        "--model",
        "local-completions",
        "--model_args",
        &model,
        "--tasks",
        "words",
    ]);
    harness.arg("--include_path").arg(tasks).arg("--log_samples").arg("--output_path").arg(tasks.join("out"));
    let output = harness.output().expect("python");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let is_samples = |path: &PathBuf| path.to_string_lossy().contains("samples_words");
    let samples = files_below(&tasks.join("out")).into_iter().find(is_samples).expect("the samples");
    let samples = std::fs::read_to_string(samples).expect("the samples");
    let of_sample = |line: &str| -> f64 {
        let sample: Value = serde_json::from_str(line).expect("JSON");
        let answer = sample["doc"]["answer"].as_u64().expect("an index") as usize;
        let nats = &sample["filtered_resps"][answer][0];
        nats.as_f64().or_else(|| nats.as_str()?.parse().ok()).expect("a log-likelihood")
    };
    samples.lines().map(of_sample).collect()
}

/// All files below a folder.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

/// The lm-evaluation-harness, in Python, over the server.
#[test]
fn the_evaluation_harness_finds_the_log_likelihoods_of_eval() {
    let Some(python) = python_with("lm_eval, transformers") else { return };
    let tasks = TRAINED.path("harness");
    write_task(&tasks);
    let here = |args: &[&str]| {
        let output = volary().current_dir(TRAINED.dir.path()).args(args).output().expect("the binary");
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    here(&["export", "--format", "safetensors", "runs/tiny", "harness-model"]);
    let ours = here(&["eval", "--run", "runs/tiny", "--tasks", "harness/words.jsonl", "--json"]);
    let ours: Value = serde_json::from_str(&ours).expect("JSON");
    let ours = ours["tasks"][0]["metrics"]["log_likelihood"]["value"].as_f64().expect("a number");
    let theirs = by_harness(&python, &Server::start(&[]), &TRAINED.path("harness-model"), &tasks);
    assert_eq!(theirs.len(), 3, "{theirs:?}");
    let mean = theirs.iter().sum::<f64>() / 3.0;
    assert!((ours - mean).abs() < 1e-4, "{ours} {mean}");
}
