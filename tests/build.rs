//! Exports a function of the suite, which says what for.

fn main() {
    if std::env::var_os("CARGO_CFG_TARGET_OS").is_some_and(|os| os == "linux") {
        println!("cargo::rustc-link-arg-tests=-Wl,--export-dynamic-symbol=__truncsfbf2");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
