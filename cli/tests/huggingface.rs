//! Models of the family of Hugging Face's `qwen3_moe`: trained, exported, imported, and loaded by
//! transformers.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{World, python_with, text, volary};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use volary_cli::config::Config;
use volary_core::costs::Costs;
use volary_core::{LayerId, LayerRange};

/// The family's model in the shape of the test bed's.
const QWEN3: [&str; 6] = [
    "--quiet",
    "--set=model.family=\"qwen3_moe\"",
    "--set=model.kv_heads=1",
    "--set=training.aux_loss=0.1",
    "--set=training.schedule={ kind = \"linear\", rate = 0.05, warmup_steps = 2 }",
    "--set=run.name=\"qwen3\"",
];

/// A run on one node, and its export.
static TRAINED: LazyLock<World> = LazyLock::new(|| {
    let world = World::new();
    world.run_train(&[&QWEN3[..], &["--nodes", "1"]].concat());
    ok(&world, &["export", "--format", "hf", "runs/qwen3", "exported"]);
    world
});

fn ok(world: &World, args: &[&str]) -> String {
    let output = volary().current_dir(world.dir.path()).args(args).output().expect("the binary");
    assert!(output.status.success(), "{args:?}: {}\n{}", text(&output.stderr), world.logs());
    text(&output.stdout)
}

fn tensors(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("model.safetensors")).expect("a file")
}

#[test]
fn training_has_the_same_bits_on_more_nodes_in_stages_and_through_a_death() {
    let world = &*TRAINED;
    let events =
        "[[event]]\nat_step = 2\ndo = \"kill\"\nnode = \"node-2\"\n[[event]]\nat_step = 4\ndo = \"join\"\n";
    fs::write(world.path("events.toml"), events).expect("a file");
    // No node has the memory for all layers: the load of the experts goes from stage to stage.
    let set: Vec<String> =
        QWEN3.iter().filter_map(|option| option.strip_prefix("--set=")).map(Into::into).collect();
    let config = Config::load(&world.path("tiny.toml"), &set).expect("a configuration");
    let costs = Costs::new(&config.model, &config.training);
    let (all, half) = (costs.all_layers(), LayerId(costs.layers() / 2));
    let halves = [LayerRange { end: half, ..all }, LayerRange { start: half, ..all }];
    let experts = (costs.moe_layers.len() * costs.experts) as u64 * costs.expert_bytes;
    let room = halves.map(|half| costs.stage_bytes(half, 2)).into_iter().max().unwrap_or_default() + experts;
    let memory = room.min(costs.stage_bytes(all, 2) - 1).to_string();
    let arms: [(&str, &[&str]); 2] = [
        ("nodes", &["--nodes", "3", "--events", "events.toml"]),
        ("stages", &["--nodes", "4", "--memory", &memory, "--set", "cluster.replication=1"]),
    ];
    for (name, options) in arms {
        let dir = format!("runs/{name}");
        world.run_train(&[&QWEN3[..], &["--dir", &dir], options].concat());
        assert_eq!(world.curve(name), world.curve("qwen3"), "{name}");
        assert_eq!(world.digest(name), world.digest("qwen3"), "{name}");
    }
    let events = fs::read_to_string(world.path("runs/stages/events.jsonl")).expect("events");
    assert!(
        events.lines().any(|line| line.contains("\"placed\"") && !line.contains("\"stages\":1,")),
        "{events}"
    );
}

#[test]
fn an_imported_export_is_the_same_model_and_goes_on_with_its_training() {
    let world = &*TRAINED;
    ok(world, &["import", "--format", "hf", "exported", "--dir", "runs/imported"]);
    ok(world, &["export", "--format", "hf", "runs/imported", "again"]);
    assert!(tensors(&world.path("exported")) == tensors(&world.path("again")), "tensors differ");
    let generate = |run: &str| {
        ok(
            world,
            &["generate", "--run", run, "--prompt", "the lane", "--temperature", "0", "--max-tokens", "20"],
        )
    };
    assert_eq!(generate("runs/imported"), generate("runs/qwen3"));

    let config = fs::read_to_string(world.path("tiny.toml")).expect("a file");
    let (before, rest) = config.split_once("[model]").expect("a model");
    let (_, after) = rest.split_once("[training]").expect("a training");
    let rate = "schedule = { kind = \"linear\", rate = 0.01 }";
    fs::write(world.path("tune.toml"), format!("{before}[training]\n{rate}{after}")).expect("a file");
    for (run, nodes) in [("tuned", "1"), ("tuned-by-two", "2")] {
        let dir = format!("runs/{run}");
        ok(world, &["import", "--format", "hf", "exported", "--config", "tune.toml", "--dir", &dir]);
        let config = format!("{dir}/config.toml");
        ok(world, &["train", &config, "--dir", &dir, "--resume", "--quiet", "--nodes", nodes]);
    }
    assert_eq!(world.curve("tuned"), world.curve("tuned-by-two"));
    assert_eq!(world.digest("tuned"), world.digest("tuned-by-two"));
    let losses = |run: &str| -> Vec<f64> {
        world.metrics(run).iter().map(|line| line["loss"].as_f64().expect("a loss")).collect()
    };
    let (first, tuned) = (losses("qwen3"), losses("tuned"));
    // It goes on where the other run ended, and not from random weights.
    assert!(tuned[0] < (first[0] + first[first.len() - 1]) / 2.0, "{first:?} {tuned:?}");

    let error = world.fails(&["import", "--format", "hf", "exported", "--dir", "runs/tuned"]);
    assert!(error.contains("already holds a run"), "{error}");
    let error = world.fails(&["import", "--format", "hf", "exported", "--config", "tiny.toml"]);
    assert!(error.contains("tiny.toml: model: expected none"), "{error}");
    let error = world.fails(&["export", "--format", "hf", "runs/imported", "again"]);
    assert!(error.contains("again exists"), "{error}");
}

#[test]
fn an_upcycled_model_begins_with_the_dense_models_loss() {
    let world = World::new();
    world.run_train(&[&QWEN3[..], &["--nodes", "1", "--set", "model.experts=0"]].concat());
    ok(&world, &["export", "--format", "hf", "runs/qwen3", "dense"]);
    let config = fs::read_to_string(world.path("tiny.toml")).expect("a file");
    let (before, rest) = config.split_once("[model]").expect("a model");
    let (_, after) = rest.split_once("[training]").expect("a training");
    fs::write(world.path("tune.toml"), format!("{before}[training]{after}")).expect("a file");
    let first_loss = |dir: &str, more: &[&str]| {
        let import = ["import", "--format", "hf", "dense", "--config", "tune.toml", "--dir", dir];
        ok(&world, &[&import[..], more].concat());
        let config = format!("{dir}/config.toml");
        ok(&world, &["train", &config, "--dir", dir, "--resume", "--quiet", "--nodes", "1"]);
        let run = dir.strip_prefix("runs/").expect("a name");
        world.metrics(run)[0]["loss"].as_f64().expect("a loss")
    };
    let (dense, sparse) = (first_loss("runs/dense", &[]), first_loss("runs/sparse", &["--upcycle", "4"]));
    // The same numbers, weighted and added in f32.
    assert!((dense - sparse).abs() < 1e-5, "{dense} {sparse}");
}

#[test]
fn a_glam_model_is_refused_with_the_format_that_has_it() {
    let world = World::new();
    world.run_train(&["--nodes", "1", "--quiet", "--set", "training.steps=3"]);
    let error = world.fails(&["export", "--format", "hf", "runs/tiny", "out"]);
    assert!(error.contains("\"qwen3_moe\"") && error.contains("safetensors"), "{error}");
    assert!(!world.path("out").exists());
}

/// Prints the greedy continuation of a prompt, and the mean log-likelihood of a text's tokens.
const PROGRAM: &str = r#"
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=20, do_sample=False, temperature=None, eos_token_id=None, pad_token_id=0)
# A text begins after the end of another.
rows = torch.tensor([[model.config.eos_token_id, *tokenizer(text).input_ids]])
with torch.no_grad():
    table = model(rows).logits[0, :-1].log_softmax(-1)
mean = table.gather(1, rows[0, 1:, None]).mean().item()
print(json.dumps(dict(text=tokenizer.decode(out[0]), mean=mean)))
"#;

#[test]
fn transformers_loads_an_export_and_says_the_same() {
    let Some(python) = python_with("torch, transformers") else { return };
    let world = &*TRAINED;
    let (prompt, page) = ("the lane", "every expert adds its share of tokens to the shard");
    let output = Command::new(python)
        .args(["-c", PROGRAM])
        .arg(world.path("exported"))
        .args([prompt, page])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .expect("python");
    let theirs: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", text(&output.stdout), text(&output.stderr)));
    let ours = ok(
        world,
        &["generate", "--run", "runs/qwen3", "--prompt", prompt, "--temperature", "0", "--max-tokens", "20"],
    );
    assert_eq!(ours.trim_end(), theirs["text"].as_str().expect("a text").trim_end());

    let tasks = format!("{}\n", serde_json::json!({ "text": page }));
    fs::write(world.path("page.jsonl"), tasks).expect("a file");
    let json = ok(world, &["eval", "--run", "runs/qwen3", "--tasks", "page.jsonl", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let perplexity = json["tasks"][0]["metrics"]["perplexity_per_token"]["value"].as_f64().expect("a number");
    let mean = theirs["mean"].as_f64().expect("a number");
    assert!((perplexity.ln() + mean).abs() < 1e-4, "{} against {mean}", -perplexity.ln());
}
