//! Compiles the settings that `tch` does not reach. Binaries of this crate find libtorch at its path at build
//! time, without `LD_LIBRARY_PATH`.
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/device/settings.cpp");
    let mut settings = cc::Build::new();
    settings.cpp(true).std("c++17").warnings(false).file("src/device/settings.cpp");
    if let Ok(root) = std::env::var("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{root}/lib");
        settings.include(PathBuf::from(root).join("include"));
    }
    settings.compile("volary_settings");
}
