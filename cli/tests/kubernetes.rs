//! The chart, rendered by Helm 3 and 4: manifests are checked with the types of the API, invalid values are
//! refused, and the binary runs the rendered arguments. Skipped with a message without Helm
//! (`make setup-tools`).
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{Guard, free_port, text, until, volary};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    core::v1::{ConfigMap, Pod, PodSpec, Secret, Service},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The installed versions of Helm.
fn helms() -> Vec<PathBuf> {
    let all = ["3", "4"].map(|version| Path::new(ROOT).join(format!(".tools/helm{version}/helm")));
    let there: Vec<PathBuf> = all.into_iter().filter(|path| path.exists()).collect();
    if there.is_empty() {
        eprintln!("skipped: no Helm on this machine (make setup-tools)");
    }
    there
}

fn helm(path: &Path, args: &[&str]) -> (bool, String) {
    let output = Command::new(path).current_dir(ROOT).args(args).output().expect("helm");
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

/// The values to render: the defaults, all examples, and all options that are off by default.
fn cases() -> Vec<Vec<String>> {
    let mut cases = vec![vec![]];
    for entry in std::fs::read_dir(Path::new(ROOT).join("examples")).expect("examples") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("kubernetes") {
            cases.push(vec!["-f".into(), path.display().to_string()]);
        }
    }
    assert!(cases.len() >= 3, "a small and a mixed cluster");
    let set = "jaeger.enabled=true,serviceMonitor.enabled=true,data.existingClaim=text,supervisor.priorityClassName=high,\
               nodeDefaults.zone=z,nodeDefaults.memory=2GiB,nodeDefaults.threads=2,nodeDefaults.runtimeClassName=nvidia,\
               nodePools.cpu.device=cuda,supervisor.persistence.storageClass=fast";
    cases.push(vec!["--set".into(), set.into()]);
    cases
}

fn render(path: &Path, case: &[String]) -> Vec<Value> {
    let mut args = vec!["template", "demo", "charts/volary", "--namespace", "ns"];
    args.extend(case.iter().map(String::as_str));
    let (good, output) = helm(path, &args);
    assert!(good, "{args:?}: {output}");
    let documents = serde_yaml_ng::Deserializer::from_str(&output);
    documents.map(|one| Value::deserialize(one).expect("YAML")).filter(|one| !one.is_null()).collect()
}

/// The part of a ServiceMonitor that the chart uses; the types of the API do not have it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ServiceMonitor {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    #[serde(rename = "metadata")]
    _metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    spec: Monitored,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Monitored {
    #[serde(rename = "selector")]
    _selector: k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector,
    endpoints: Vec<Scraped>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scraped {
    port: String,
    #[serde(rename = "path")]
    _path: String,
    #[serde(rename = "interval")]
    _interval: String,
}

/// A manifest as its type; a field that the type does not have is an error.
fn strict<T: DeserializeOwned>(manifest: &Value) -> Result<T, String> {
    let mut unknown = Vec::new();
    let read = serde_ignored::deserialize(manifest.clone(), |path| unknown.push(path.to_string()));
    let read = read.map_err(|error: serde_yaml_ng::Error| error.to_string())?;
    if unknown.is_empty() { Ok(read) } else { Err(format!("unknown fields: {}", unknown.join(", "))) }
}

/// Checks a manifest by its kind, and returns the pod that it creates, if any.
fn check(manifest: &Value) -> Result<Option<PodSpec>, String> {
    let pod = |template: Option<PodSpec>| template.ok_or_else(|| "no pod".to_owned()).map(Some);
    match manifest["kind"].as_str().unwrap_or_default() {
        "StatefulSet" => pod(strict::<StatefulSet>(manifest)?.spec.and_then(|spec| spec.template.spec)),
        "Deployment" => pod(strict::<Deployment>(manifest)?.spec.and_then(|spec| spec.template.spec)),
        "Pod" => pod(strict::<Pod>(manifest)?.spec),
        "ConfigMap" => strict::<ConfigMap>(manifest).map(|_| None),
        "Secret" => strict::<Secret>(manifest).map(|_| None),
        "Service" => strict::<Service>(manifest).map(|_| None),
        "NetworkPolicy" => strict::<NetworkPolicy>(manifest).map(|_| None),
        "PodDisruptionBudget" => strict::<PodDisruptionBudget>(manifest).map(|_| None),
        "ServiceMonitor" => {
            let monitor = strict::<ServiceMonitor>(manifest)?;
            assert!(monitor.spec.endpoints.iter().all(|endpoint| endpoint.port == "http"));
            Ok(None)
        }
        other => Err(format!("a {other:?} is not checked")),
    }
}

#[test]
fn all_values_pass_a_strict_lint_and_all_manifests_match_their_types() {
    for helm_path in helms() {
        for case in cases() {
            let mut args = vec!["lint", "--strict", "charts/volary"];
            args.extend(case.iter().map(String::as_str));
            let (good, output) = helm(&helm_path, &args);
            assert!(good, "{output}");
            for manifest in render(&helm_path, &case) {
                let pod = check(&manifest).unwrap_or_else(|error| {
                    panic!(
                        "{case:?}: {} {:?}: {error}",
                        manifest["kind"].as_str().unwrap_or("?"),
                        manifest["metadata"]["name"]
                    )
                });
                pod.iter().for_each(is_confined);
            }
        }
    }
}

/// No root, a read-only root file system, no capabilities, no token of the API, bounded memory.
fn is_confined(pod: &PodSpec) {
    assert_eq!(pod.automount_service_account_token, Some(false));
    let security = pod.security_context.as_ref().expect("a security context");
    assert_eq!(security.run_as_non_root, Some(true));
    for container in &pod.containers {
        let security = container.security_context.as_ref().expect("a security context");
        assert_eq!(
            (security.read_only_root_filesystem, security.allow_privilege_escalation),
            (Some(true), Some(false))
        );
        let dropped = security.capabilities.as_ref().and_then(|all| all.drop.clone());
        assert_eq!(dropped, Some(vec!["ALL".to_owned()]), "{}", container.name);
        let limits = container.resources.as_ref().and_then(|all| all.limits.clone()).expect("limits");
        assert!(limits.contains_key("memory"), "{}", container.name);
    }
}

#[test]
fn the_check_finds_a_misspelled_field() {
    let good = "apiVersion: v1\nkind: Service\nmetadata: { name: a }\nspec: { clusterIP: None }\n";
    let bad = good.replace("clusterIP", "clusterIp");
    assert!(check(&serde_yaml_ng::from_str(good).expect("YAML")).is_ok());
    let error = check(&serde_yaml_ng::from_str(&bad).expect("YAML")).expect_err("an error");
    assert!(error.contains("clusterIp"), "{error}");
    assert!(check(&serde_yaml_ng::from_str("kind: Widget").expect("YAML")).is_err());
}

#[test]
fn invalid_values_are_refused() {
    let bad = [
        "nodePools.cpu.replcas=3",
        "nodePools.cpu.replicas=three",
        "nodePools.cpu.replicas=-1",
        "nodePools.cpu.minReplicas=4",
        "nodePools.cpu.maxReplicas=1",
        "nodePools.cpu.device=tpu",
        "nodePools.cpu.memory=much",
        "nodePools.cpu.drainSeconds=0",
        "nodePools.CPU_pool.replicas=1",
        "config=nothing",
        "image.pullPolicy=Sometimes",
        "serviceMonitor.interval=soon",
        "telemetry.otlpEndpoint=collector:4317",
        "supervisor.replicas=2",
        "jaegr.enabled=true",
    ];
    for path in helms() {
        for set in bad {
            let (good, output) = helm(&path, &["template", "demo", "charts/volary", "--set", set]);
            assert!(!good && output.contains("Error"), "{set} was accepted: {output}");
        }
    }
}

fn find<'a>(manifests: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = manifests.iter().find(|one| one["kind"] == kind && one["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

#[test]
fn quic_never_goes_through_a_cluster_ip_and_nodes_never_see_the_authoritys_key() {
    for path in helms() {
        for case in cases() {
            let manifests = render(&path, &case);
            let mut pools = 0;
            for manifest in &manifests {
                if manifest["kind"] == "Service" {
                    let service: Service = strict(manifest).expect("a Service");
                    let spec = service.spec.expect("a spec");
                    let udp = spec.ports.iter().flatten().any(|port| port.protocol.as_deref() == Some("UDP"));
                    let headless = spec.cluster_ip.as_deref() == Some("None");
                    assert!(!udp || (headless && spec.publish_not_ready_addresses == Some(true)));
                }
                let labels = &manifest["spec"]["template"]["metadata"]["labels"];
                if labels["app.kubernetes.io/component"] != "node" {
                    continue;
                }
                pools += 1;
                let set: StatefulSet = strict(manifest).expect("a StatefulSet");
                let pod = set.spec.and_then(|spec| spec.template.spec).expect("a pod");
                for volume in pod.volumes.iter().flatten().filter_map(|volume| volume.secret.as_ref()) {
                    let keys: Vec<&str> =
                        volume.items.iter().flatten().map(|item| item.key.as_str()).collect();
                    assert_eq!(keys, ["join-token"]);
                }
                let hook =
                    pod.containers[0].lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()?.exec.as_ref());
                let command = hook.and_then(|exec| exec.command.clone()).expect("a preStop hook");
                assert_eq!(command[..4], ["volary", "drain", "--pid", "1"]);
                let wait: i64 = command[5].trim_end_matches('s').parse().expect("seconds");
                assert!(pod.termination_grace_period_seconds.expect("a grace period") > wait);
            }
            assert!(pools > 0);
        }
    }
}

/// The rendered configuration, identity and arguments, with ports and folders of this machine instead of the
/// cluster's. The supervisor restarts in the middle, as when Kubernetes moves a pod, and the run continues.
#[test]
fn the_binary_runs_the_rendered_arguments() {
    let Some(path) = helms().pop() else { return };
    let manifests = render(&path, &[]);
    let folder = tempfile::tempdir().expect("a folder");
    let place = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(place("identity")).expect("a folder");
    std::fs::create_dir_all(place("inline")).expect("a folder");
    let secret = find(&manifests, "Secret", "demo-identity");
    for (key, value) in secret["stringData"].as_mapping().expect("data") {
        let (key, value) = (key.as_str().expect("a key"), value.as_str().expect("text"));
        std::fs::write(place("identity").join(key), value).expect("a file");
    }
    let data = find(&manifests, "ConfigMap", "demo-data")["data"]["demo.txt"].as_str().expect("text");
    // One file is only a few sequences.
    (0..40).for_each(|n| {
        std::fs::write(place("inline").join(format!("{n}.txt")), format!("{n}\n{data}\n{n}"))
            .expect("a file");
    });
    let config = find(&manifests, "ConfigMap", "demo-run")["data"]["run.toml"].as_str().expect("text");
    let config = config.replace("/data/inline", &place("inline").display().to_string());
    std::fs::write(place("run.toml"), &config).expect("a file");
    let parsed = volary_cli::config::Config::load(&place("run.toml"), &[]).expect("a valid configuration");
    assert_eq!(parsed.run.name, "demo");

    let (quic, http) = (free_port(), free_port());
    let run = place("run").display().to_string();
    let in_place = |arg: &str| {
        arg.replace("/etc/volary/run/run.toml", &place("run.toml").display().to_string())
            .replace("/var/lib/volary/run", &run)
            .replace("/etc/volary/identity", &place("identity").display().to_string())
            .replace("/etc/volary/join/join-token", &place("identity/join-token").display().to_string())
            .replace("demo-supervisor-0.demo-supervisor.ns.svc:7100", &quic.to_string())
            .replace("[::]:7680", &format!("[::]:{}", http.port()))
            .replace("[::]:9464", "[::]:0")
            .replace("$(VOLARY_ZONE)", "zone-1")
    };
    let args = |name: &str| -> Vec<String> {
        let container = &find(&manifests, "StatefulSet", name)["spec"]["template"]["spec"]["containers"][0];
        let args = container["args"].as_sequence().expect("args").iter();
        // All pods are on this machine, where a port is free once.
        let port = if name == "demo-supervisor" { quic.port() } else { 0 };
        let listen = |arg: String| arg.replace("[::]:7100", &format!("[::]:{port}"));
        args.map(|arg| listen(in_place(arg.as_str().expect("text")))).collect()
    };
    let quick = ["--set", "training.steps=60", "--set", "validation.rounds=0"];
    let start_supervisor = || Guard::start(volary().args(args("demo-supervisor")).args(quick));
    let mut supervisor = start_supervisor();
    let start_node = |name: &str| {
        let args = args("demo-cpu").into_iter().map(|arg| arg.replace("$(POD_NAME)", name));
        Guard::start(volary().args(args).args(["--threads", "1"]))
    };
    let _nodes = [start_node("demo-cpu-0"), start_node("demo-cpu-1")];
    let steps = || common::lines(&place("run/metrics.jsonl"));
    until("steps", Duration::from_secs(120), || steps() >= 5);
    let status = volary().args(["status", "--dir", &run]).output().expect("the binary");
    assert!(status.status.success(), "as NOTES.txt says: {}", text(&status.stderr));
    common::signal(supervisor.0.id(), "-TERM");
    assert!(supervisor.wait(Duration::from_secs(60)).success());
    assert!(steps() < 60, "it ended before the last step");
    let mut supervisor = start_supervisor();
    until("all steps", Duration::from_secs(120), || steps() == 60);
    std::thread::sleep(Duration::from_secs(2));
    assert!(supervisor.0.try_wait().expect("a status").is_none(), "its dashboard stays");
    common::signal(supervisor.0.id(), "-TERM");
    assert!(supervisor.wait(Duration::from_secs(60)).success());
    let events = std::fs::read_to_string(place("run/events.jsonl")).expect("events");
    assert!(events.contains("demo-cpu-0") && events.contains("demo-cpu-1"), "{events}");
    assert!(events.contains("\"returned\"") && !events.contains("went_back"), "{events}");
}

#[test]
fn the_charts_readme_matches_its_values() {
    let output = Command::new("python3").current_dir(ROOT).args(["scripts/chart-readme", "--check"]).output();
    let Ok(output) = output else { return eprintln!("skipped: no Python on this machine") };
    assert!(output.status.success(), "{}", text(&output.stderr));
}
