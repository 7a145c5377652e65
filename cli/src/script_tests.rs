//! Valid and invalid scripts.

use super::*;

const ALL: &str = r#"
[[event]]
at_step = 9
do = "kill-supervisor"
[[event]]
at_step = 2
do = "kill"
node = "node-2"
[[event]]
at_step = 2
do = "join"
[[event]]
at_step = 2
do = "stop"
node = "node-4"
for_seconds = 3
[[event]]
at_step = 4
do = "drain"
node = "node-1"
[[event]]
at_step = 5
do = "partition"
node = "node-3"
for_seconds = 0.25
[[event]]
at_step = 6
do = "cut"
node = "node-3"
peer = "node-4"
for_seconds = 1.5
[[event]]
at_step = 0
do = "lose"
node = "node-3"
fraction = 0.3
for_seconds = 1.5
[[event]]
at_step = 7
do = "corrupt"
node = "node-3"
shard = "layer.1.expert.3"
"#;

fn due(script: &mut Script, step: u64) -> Vec<String> {
    std::iter::from_fn(|| script.due(step)).map(|event| event.action.to_string()).collect()
}

fn error(text: &str) -> String {
    let error = Script::parse(text, "e.toml", 3).expect_err(text);
    let line = format!("{error:#}");
    assert_eq!(line.lines().count(), 1, "{line}");
    line
}

#[test]
fn events_are_due_in_the_order_of_steps_and_within_a_step_in_the_order_of_the_file() {
    let mut script = Script::parse(ALL, "e.toml", 3).expect("a script");
    assert_eq!(due(&mut script, 0), ["lose 0.3 of the packets of node-3 for 1.5 s"]);
    assert!(due(&mut script, 1).is_empty());
    // Skipped steps lose no event.
    assert_eq!(due(&mut script, 4), ["kill node-2", "join", "stop node-4 for 3 s", "drain node-1"]);
    assert_eq!(script.pending().len(), 4);
    assert_eq!(
        due(&mut script, 100),
        [
            "partition node-3 for 0.25 s",
            "cut node-3 from node-4 for 1.5 s",
            "flip a bit of layer.1.expert.3 on node-3",
            "kill the supervisor"
        ]
    );
    assert_eq!(script.pending().len(), 0);
}

#[test]
fn a_fault_inside_a_node_is_a_line_for_one_node() {
    let script = Script::parse(ALL, "e.toml", 3).expect("a script");
    let lines: Vec<String> = script
        .pending()
        .filter_map(|event| event.action.node_fault())
        .map(|(node, fault)| format!("{node}: {fault}"))
        .collect();
    assert_eq!(
        lines,
        [
            "node-3: lose 0.3 1500",
            "node-3: partition 250",
            "node-3: cut node-4 1500",
            "node-3: corrupt layer.1.expert.3"
        ]
    );
}

#[test]
fn an_invalid_event_names_file_event_and_the_expected_value() {
    let good = "[[event]]\nat_step = 1\ndo = \"join\"\n";
    let cases = [
        ("do = \"kill\"\nnode = \"node-1\"", "missing field `at_step`"),
        ("at_step = -1\ndo = \"join\"", "at_step = -1: expected a step"),
        ("at_step = \"two\"\ndo = \"join\"", "at_step = \"two\": expected a step"),
        ("at_step = 1", "missing field `do`"),
        ("at_step = 1\ndo = \"kil\"", "unknown variant `kil`, expected one of"),
        ("at_step = 1\ndo = \"kil\"", "did you mean `kill`?"),
        ("at_step = 1\ndo = \"kill\"", "do = \"kill\": missing field `node`"),
        ("at_step = 1\ndo = \"drain\"", "missing field `node`"),
        ("at_step = 1\ndo = \"stop\"\nnode = \"node-1\"", "do = \"stop\": missing field `for_seconds`"),
        ("at_step = 1\ndo = \"partition\"\nfor_seconds = 1.0", "missing field `node`"),
        ("at_step = 1\ndo = \"join\"\nnode = \"node-4\"", "do = \"join\": unknown field `node`"),
        ("at_step = 1\ndo = \"kill-supervisor\"\nnode = \"node-1\"", "unknown field `node`"),
        ("at_step = 1\ndo = \"corrupt\"\nnode = \"node-1\"", "missing field `shard`"),
        ("at_step = 1\ndo = \"corrupt\"\nnode = \"node-1\"\nshard = \"\"", "expected the name of a shard"),
        (
            "at_step = 1\ndo = \"kill\"\nnode = \"node-1\"\nfor_seconds = 1.0",
            "unknown field `for_seconds`, expected `node`",
        ),
        ("at_step = 1\ndo = \"kill\"\nnode = 1", "expected a string"),
        ("at_step = 1\ndo = \"kill\"\nnode = \"node-6\"", "\"node-6\": expected node-1 to node-4"),
        ("at_step = 0\ndo = \"kill\"\nnode = \"node-4\"", "expected node-1 to node-3"),
        ("at_step = 1\ndo = \"kill\"\nnode = \"node-0\"", "expected node-1 to node-4"),
        ("at_step = 1\ndo = \"kill\"\nnode = \"node-01\"", "expected node-1 to node-4"),
        (
            "at_step = 1\ndo = \"stop\"\nnode = \"node-1\"\nfor_seconds = 0.0",
            "for_seconds = 0: expected 0.001 to 3600",
        ),
        ("at_step = 1\ndo = \"stop\"\nnode = \"node-1\"\nfor_seconds = 3600.1", "expected 0.001 to 3600"),
        ("at_step = 1\ndo = \"stop\"\nnode = \"node-1\"\nfor_seconds = nan", "expected 0.001 to 3600"),
        (
            "at_step = 1\ndo = \"lose\"\nnode = \"node-1\"\nfraction = 1.5\nfor_seconds = 1",
            "fraction = 1.5: expected more than 0 and at most 1",
        ),
        (
            "at_step = 1\ndo = \"lose\"\nnode = \"node-1\"\nfraction = 0\nfor_seconds = 1",
            "fraction = 0: expected",
        ),
        (
            "at_step = 1\ndo = \"cut\"\nnode = \"node-1\"\npeer = \"node-1\"\nfor_seconds = 1",
            "peer = \"node-1\": expected another node",
        ),
        (
            "at_step = 1\ndo = \"cut\"\nnode = \"node-1\"\npeer = \"node-9\"\nfor_seconds = 1",
            "\"node-9\": expected node-1 to node-4",
        ),
    ];
    for (event, expected) in cases {
        let message = error(&format!("{good}[[event]]\n{event}\n"));
        assert!(message.starts_with("e.toml, event 2: "), "{message}");
        assert!(message.contains(expected), "{message}\nexpected: {expected}");
    }
}

#[test]
fn a_file_that_is_not_a_script_is_named() {
    assert_eq!(error(""), "e.toml: expected [[event]] tables");
    assert_eq!(error("event = 3"), "e.toml: expected [[event]] tables");
    assert_eq!(error("event = [3]"), "e.toml, event 1: expected a table: [[event]]");
    assert!(error("[[event]]\nat_step = 1\ndo = \"join\"\n[run]\n").contains("unknown key `run`"));
    assert!(error("[[event]]\nat_step = = 1").starts_with("e.toml, line 2"));
    let many = "[[event]]\nat_step = 1\ndo = \"join\"\n".repeat(SCRIPT_EVENTS_MAX + 1);
    assert_eq!(error(&many), "e.toml: 1001 events: expected at most 1000");
    let missing = Script::load(Path::new("no/such.toml"), 3).expect_err("an error");
    assert!(format!("{missing:#}").starts_with("events no/such.toml: "));
}

#[test]
fn the_example_is_a_valid_script_for_the_quickstart() {
    let example = include_str!("../../examples/events.toml");
    assert!(Script::parse(example, "events.toml", 3).expect("a script").pending().len() >= 5);
}
