//! Models that Hugging Face's transformers made (`qwen3/make.py`), in Volary: logits, losses and gradients.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

use safetensors::SafeTensors;
use std::fs;
use std::path::{Path, PathBuf};
use volary_core::options::TrainingOptions;
use volary_core::{Lane, ShardId, Step};
use volary_formats::export::{Export, Origin};
use volary_formats::files::TensorFiles;
use volary_formats::qwen3::{self, Import};
use volary_model::decoder::{Decoder, Input};
use volary_model::reference::Reference;
use volary_model::{device, store_given};

/// f32 in other orders of addition, over four layers of logits near 5.
const TOLERANCE: f32 = 1e-4;
/// Of gradients, relative to the norm of each parameter's.
const GRADIENT_TOLERANCE: f64 = 1e-4;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qwen3").join(name)
}

fn training() -> TrainingOptions {
    TrainingOptions { sequences_per_lane: 2, sequence_length: 12, aux_loss: 0.1, ..TrainingOptions::new(1) }
}

/// Fetches the shards of an imported model, as a checkpoint would.
fn fetch(model: &Import) -> impl Fn(ShardId) -> Result<Vec<u8>, volary_model::Error> + use<'_> {
    |shard| {
        let given = model.parameters(shard).expect("parameters");
        store_given(model.architecture(), &training().optimizer, 1, shard, given)
    }
}

fn reference(model: &Import) -> Reference {
    let cpu = device::parse("cpu").unwrap();
    Reference::load(model.architecture(), &training(), 1, cpu, fetch(model)).expect("a model")
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The tokens of the sequences, and the logits of all tokens but the last, one after the other.
fn expected(name: &str) -> (Vec<Vec<u32>>, Vec<f32>, f32) {
    let bytes = fs::read(folder(name).join("expected.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| all.tensor(name).unwrap().data().to_vec();
    let ids: Vec<u32> =
        tensor("tokens").chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    let rows = ids.chunks_exact(13).map(<[u32]>::to_vec).collect();
    (rows, floats(&tensor("logits")), floats(&tensor("loss"))[0])
}

fn assert_near(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert!((ours - theirs).abs() < TOLERANCE, "{what}: {ours}, expected {theirs}");
    }
}

#[test]
fn logits_are_those_of_transformers_in_training_and_in_generation() {
    device::single_thread();
    for name in ["moe", "dense"] {
        let model = Import::open(&folder(name)).expect("a model");
        let (rows, logits, _) = expected(name);
        let reference = reference(&model);
        let cpu = device::parse("cpu").unwrap();
        let decoder = Decoder::load(model.architecture(), 12, cpu, fetch(&model)).expect("a decoder");
        let mut cache = decoder.cache(rows.len()).unwrap();
        for (slot, (row, theirs)) in
            rows.iter().zip(logits.chunks_exact(logits.len() / rows.len())).enumerate()
        {
            let ours = reference.logits(&row[..12]).expect("logits").concat();
            assert_near(&ours, theirs, name);
            let mut one_by_one = Vec::new();
            for token in &row[..12] {
                let input = Input { slot, tokens: &[*token], scoring: None };
                one_by_one.extend(decoder.advance(&mut cache, &[input]).expect("a pass").remove(0).logits);
            }
            assert_near(&one_by_one, theirs, name);
        }
    }
}

#[test]
fn the_loss_and_every_gradient_are_those_of_transformers_the_balance_of_all_layers_included() {
    device::single_thread();
    for name in ["moe", "dense"] {
        let model = Import::open(&folder(name)).expect("a model");
        let theirs = Import::open(&folder(name).join("gradients")).expect("gradients");
        let (rows, _, loss) = expected(name);
        let ours = reference(&model).lane(&rows.concat(), (Step(1), Lane(0)), true).expect("a lane");
        assert!((ours.loss as f32 - loss).abs() < 1e-5, "{name}: {}, expected {loss}", ours.loss);
        for (shard, ours) in ours.gradient_values().unwrap() {
            let theirs = theirs.parameters(shard).expect("gradients");
            for (at, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                let theirs = floats(&theirs.expect("a gradient"));
                let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v * v)).sum::<f64>().sqrt();
                let difference = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b));
                let error = difference / norm(&mut theirs.iter().copied()).max(1e-6);
                assert!(
                    error < GRADIENT_TOLERANCE,
                    "{name}, {shard}, parameter {at}: relative error {error}"
                );
            }
        }
    }
}

/// All tensors of a folder by name.
fn tensors(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let files = TensorFiles::open(folder).expect("files");
    files.names().map(|name| (name.to_owned(), files.read(name).expect("a tensor"))).collect()
}

fn export(model: &Import, target: &Path) {
    let origin = Origin {
        run: "test".into(),
        step: Step(0),
        digest: String::new(),
        validation_loss: None,
        parameters: model.architecture().parameters(),
        activated_parameters: model.architecture().activated_parameters(),
    };
    let export = Export {
        architecture: model.architecture(),
        sequence_length: 64,
        origin: &origin,
        tokenizer: &folder("make.py"),
        end_of_text: "<|endoftext|>",
        validation: &[],
    };
    qwen3::export(&export, (0.1, 0), target, fetch(model)).expect("an export");
}

#[test]
fn an_export_of_an_import_has_the_same_bytes_in_every_tensor_again_and_again() {
    let parent = tempfile::tempdir().unwrap();
    for name in ["moe", "dense"] {
        let original = folder(name);
        let mut from = original.clone();
        for round in 0..2 {
            let target = parent.path().join(format!("{name}-{round}"));
            export(&Import::open(&from).expect("a model"), &target);
            assert_eq!(tensors(&target), tensors(&original));
            from = target;
        }
        let [first, second] = [0, 1].map(|round| parent.path().join(format!("{name}-{round}")));
        for file in ["config.json", "model.safetensors"] {
            assert_eq!(fs::read(first.join(file)).unwrap(), fs::read(second.join(file)).unwrap(), "{file}");
        }
    }
}

/// Every expert is a copy of the feed-forward, so that the gate makes no difference: its weights add up to 1.
#[test]
fn an_upcycled_model_starts_with_the_logits_of_the_dense_one() {
    device::single_thread();
    let dense = Import::open(&folder("dense")).expect("a model");
    let sparse = Import::open(&folder("dense")).expect("a model").upcycle(6).expect("a sparse model");
    assert_eq!(sparse.architecture().experts, 6);
    let (rows, ..) = expected("dense");
    let [dense, sparse] = [&dense, &sparse].map(reference);
    for row in rows {
        let [dense, sparse] = [&dense, &sparse].map(|model| model.logits(&row).expect("logits").concat());
        assert_near(&sparse, &dense, "upcycled");
    }
    let again = Import::open(&folder("moe")).expect("a model").upcycle(6).map(drop).unwrap_err();
    assert!(again.to_string().ends_with("it has 5 experts: expected a dense model"), "{again}");
}

/// A copy of a folder whose `config.json` has another value, or whose tensors are changed.
struct Altered(tempfile::TempDir);

impl Altered {
    fn new() -> Self {
        let copy = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(folder("moe").join(file), copy.path().join(file)).unwrap();
        }
        Self(copy)
    }

    fn config(self, key: &str, value: serde_json::Value) -> Self {
        let path = self.0.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        self
    }

    fn bytes(self, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let path = self.0.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
        self
    }

    fn error(&self) -> String {
        Import::open(self.0.path()).map(drop).expect_err("an error").to_string()
    }
}

#[test]
fn a_folder_that_does_not_fit_is_one_clear_error() {
    let names = |error: String, parts: &[&str]| {
        assert_eq!(error.lines().count(), 1, "{error}");
        for part in parts {
            assert!(error.contains(part), "{part}: {error}");
        }
    };
    names(Altered::new().config("model_type", "mixtral".into()).error(), &["\"mixtral\"", "\"qwen3_moe\""]);
    names(
        Altered::new().config("num_experts_per_tok", 8.into()).error(),
        &["num_experts_per_tok = 8", "expected 2"],
    );
    names(Altered::new().config("decoder_sparse_step", 1.into()).error(), &["decoder_sparse_step = 1"]);
    names(Altered::new().config("vocab_size", "many".into()).error(), &["vocab_size = \"many\""]);
    let wider = Altered::new().config("intermediate_size", 24.into()).error();
    names(wider, &["model.layers.0.mlp.gate_proj.weight is [20, 16], expected [24, 16]"]);
    let fewer = Altered::new().config("num_hidden_layers", 2.into()).error();
    names(fewer, &["model.layers.2.input_layernorm.weight is unknown", "more"]);
    let more = Altered::new().config("num_local_experts", 6.into()).error();
    names(more, &["model.layers.1.mlp.experts.5.gate_proj.weight is missing"]);
    names(Altered::new().bytes(|bytes| bytes.truncate(9_000)).error(), &["model.safetensors", "cut off"]);
    names(Altered::new().bytes(|bytes| bytes.truncate(3)).error(), &["no safetensors file"]);
    names(Altered::new().bytes(|bytes| bytes[..8].fill(0xff)).error(), &["a header of"]);
    names(Altered::new().bytes(|bytes| bytes[9] = b'x').error(), &["model.safetensors"]);
    let missing = tempfile::tempdir().unwrap();
    let error = Import::open(missing.path()).map(drop).unwrap_err().to_string();
    names(error, &["config.json"]);
}
