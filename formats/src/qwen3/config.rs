//! `config.json` and the architecture.

use serde_json::{Value, json};
use volary_core::architecture::{Architecture, Family, presets};
use volary_core::dispatch::{Capacity, TOP_K};

/// The epsilon of all norms.
const NORM_EPSILON: f64 = 1e-6;

/// The configuration of a model.
pub(super) fn write(a: &Architecture, sequence_length: usize, aux_loss: f64, end_of_text: u32) -> Value {
    let mut config = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": a.vocabulary,
        "hidden_size": a.hidden,
        "intermediate_size": a.feed_forward,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads(),
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": a.rope_theta,
        "rope_scaling": null,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "use_sliding_window": false,
        "sliding_window": null,
        "tie_word_embeddings": a.is_tied(),
        "initializer_range": 0.02,
        "use_cache": true,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    });
    if a.experts > 0 {
        config["architectures"] = json!(["Qwen3MoeForCausalLM"]);
        config["model_type"] = "qwen3_moe".into();
        config["num_experts"] = a.experts.into();
        config["num_experts_per_tok"] = TOP_K.into();
        config["moe_intermediate_size"] = a.expert_width().into();
        config["decoder_sparse_step"] = 2.into();
        config["mlp_only_layers"] = json!([]);
        config["norm_topk_prob"] = true.into();
        config["router_aux_loss_coef"] = aux_loss.into();
        config["output_router_logits"] = false.into();
    }
    config
}

/// The architecture of a configuration.
///
/// # Errors
/// What the file has, and what was expected.
pub(super) fn read(config: &Value) -> Result<Architecture, String> {
    let family = config["model_type"].as_str().unwrap_or_default();
    let has_experts = match family {
        "qwen3" => false,
        "qwen3_moe" => true,
        _ => {
            let found =
                if family.is_empty() { "no model_type".into() } else { format!("model_type {family:?}") };
            return Err(format!("{found}: expected \"qwen3\" or \"qwen3_moe\""));
        }
    };
    // What a file leaves out has the value that transformers gives it.
    let expect = |key: &str, expected: Value, default: &Value| {
        let found = config.get(key).unwrap_or(default);
        let same = match (found.as_f64(), expected.as_f64()) {
            (Some(found), Some(expected)) => found == expected,
            _ => *found == expected,
        };
        if same { Ok(()) } else { Err(format!("{key} = {found}: expected {expected}")) }
    };
    expect("hidden_act", json!("silu"), &json!("silu"))?;
    expect("rms_norm_eps", json!(NORM_EPSILON), &json!(NORM_EPSILON))?;
    expect("attention_bias", json!(false), &json!(false))?;
    expect("use_sliding_window", json!(false), &json!(false))?;
    expect("rope_scaling", Value::Null, &Value::Null)?;
    let rope = &config["rope_parameters"];
    if let Some(kind) = rope.get("rope_type").filter(|kind| **kind != "default") {
        return Err(format!("rope_parameters.rope_type = {kind}: expected \"default\""));
    }
    let number = |key: &str| {
        let value = config.get(key).ok_or_else(|| format!("it has no {key}"))?;
        value
            .as_u64()
            .map(|value| value as usize)
            .ok_or_else(|| format!("{key} = {value}: expected a number"))
    };
    let optional =
        |key: &str| config.get(key).filter(|value| !value.is_null()).map(|_| number(key)).transpose();
    let heads = number("num_attention_heads")?;
    let theta = rope["rope_theta"].as_f64().or_else(|| config["rope_theta"].as_f64()).unwrap_or(10_000.0);
    let mut a = presets().swap_remove(0).architecture;
    a.family = Family::Qwen3Moe;
    (a.vocabulary, a.hidden, a.layers) =
        (number("vocab_size")?, number("hidden_size")?, number("num_hidden_layers")?);
    (a.heads, a.kv_heads) = (heads, optional("num_key_value_heads")?.filter(|&kv_heads| kv_heads != heads));
    a.head_dim = optional("head_dim")?.unwrap_or_else(|| a.hidden / heads.max(1));
    (a.feed_forward, a.experts, a.capacity) = (number("intermediate_size")?, 0, Capacity::Dropless);
    (a.tied_embedding, a.rope_theta) = (config["tie_word_embeddings"].as_bool().filter(|tied| *tied), theta);
    if has_experts {
        expect("num_experts_per_tok", json!(TOP_K), &json!(8))?;
        expect("decoder_sparse_step", json!(2), &json!(1))?;
        expect("norm_topk_prob", json!(true), &json!(false))?;
        expect("mlp_only_layers", json!([]), &json!([]))?;
        a.experts = optional("num_experts")?.map_or_else(|| number("num_local_experts"), Ok)?;
        a.expert_hidden = Some(number("moe_intermediate_size")?).filter(|&width| width != a.feed_forward);
    }
    a.check().map_err(|error| error.to_string())?;
    Ok(a)
}
