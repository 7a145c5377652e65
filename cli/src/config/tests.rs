use super::*;

const GOOD: &str = r#"
[run]
name = "t"
[data]
sources = [{ name = "a", path = "a.txt", weight = 1.0 }]
vocabulary = 300
[model]
vocabulary = 300
hidden = 8
layers = 2
heads = 2
head_dim = 4
feed_forward = 16
experts = 4
[training]
steps = 5
"#;

fn error(text: &str, set: &[&str]) -> String {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    Config::parse(text, "c.toml", &set).expect_err("an error").to_string()
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_known_one() {
    let message = error(&GOOD.replace("steps = 5", "steps = 5\nlanez = 3"), &[]);
    assert!(message.starts_with("c.toml, line 17, key training.lanez: unknown field `lanez`"), "{message}");
    assert!(message.ends_with("did you mean `lanes`?"), "{message}");
    assert_eq!(message.lines().count(), 1);
}

#[test]
fn only_the_wrong_one_of_several_settings_is_named() {
    let set = ["training.steps=7", "training.lanes=\"few\"", "model.layers=4"];
    let message = error(GOOD, &set);
    assert!(
        message.starts_with("--set training.lanes=\"few\": ") && !message.contains("layers"),
        "{message}"
    );
}

#[test]
fn a_wrong_type_names_line_key_and_what_was_expected() {
    let message = error(&GOOD.replace("steps = 5", "steps = \"many\""), &[]);
    assert!(message.contains("line 16, key training.steps") && message.contains("expected u64"), "{message}");
}

#[test]
fn a_value_out_of_range_names_its_key() {
    assert!(error(&GOOD.replace("hidden = 8", "hidden = 0"), &[]).contains("model.hidden = 0: expected"));
    assert!(error(GOOD, &["run.name=../up"]).contains("run.name"));
}

#[test]
fn set_takes_a_toml_value_or_a_plain_string_for_any_key() {
    let set = [
        "training.steps=9".to_owned(),
        "run.name=other".to_owned(),
        "model.capacity={ factor = 1.5 }".to_owned(),
    ];
    let config = Config::parse(GOOD, "c.toml", &set).expect("a config");
    assert_eq!((config.training.steps, config.run.name.as_str()), (9, "other"));
    assert_eq!(config.model.capacity, volary_core::dispatch::Capacity::Factor(1.5));
    assert!(error(GOOD, &["training.stepz=9"]).contains("did you mean `steps`"));
    assert!(error(GOOD, &["nonsense"]).contains("expected key.path=value"));
}

#[test]
fn a_key_that_is_missing_in_the_file_may_come_from_set() {
    let text = GOOD.replace("steps = 5", "");
    assert!(error(&text, &[]).contains("missing field `steps`"));
    assert!(Config::parse(&text, "c.toml", &["training.steps=3".to_owned()]).is_ok());
}

const PRESET: &str = r#"
[run]
name = "t"
[data]
sources = [{ name = "a", path = "a.txt" }]
[model]
preset = "0.1b-64e"
experts = 16
[training]
steps = 5
"#;

#[test]
fn a_preset_is_the_papers_shape_with_single_keys_overridden() {
    let shape =
        |name: &str| presets().into_iter().find(|preset| preset.name == name).expect("a preset").architecture;
    let config = Config::parse(PRESET, "c.toml", &[]).expect("a configuration");
    assert_eq!(config.model, Architecture { experts: 16, ..shape("0.1b-64e") });
    let set = ["model.preset=1.7b-32e".to_owned(), "model.layers=4".to_owned()];
    let config = Config::parse(PRESET, "c.toml", &set).expect("a configuration");
    assert_eq!(config.model, Architecture { experts: 16, layers: 4, ..shape("1.7b-32e") });
    // What a run writes down is the shape itself.
    let written = toml::to_string(&config).expect("TOML");
    assert!(!written.contains("preset"));
    assert_eq!(Config::parse(&written, "config.toml", &[]).expect("a configuration"), config);
}

#[test]
fn errors_beside_a_preset_name_the_key_and_the_file_or_the_assignment() {
    let message = error(&PRESET.replace("0.1b-64e", "0.2b"), &[]);
    assert!(message.contains("c.toml: model.preset") && message.contains("1.7b-128e"), "{message}");
    let message = error(&PRESET.replace("experts", "expertz"), &[]);
    assert!(message.contains("c.toml: ") && message.contains("did you mean `experts`"), "{message}");
    let message = error(PRESET, &["training.steps=6", "model.preset=0.2b"]);
    assert!(message.contains("--set model.preset=0.2b: "), "{message}");
    let message = error(&PRESET.replace("steps = 5", ""), &["model.experts=8"]);
    assert!(message.contains("missing field `steps`"), "{message}");
}
