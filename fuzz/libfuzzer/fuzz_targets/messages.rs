#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| volary_fuzz::messages(bytes));
