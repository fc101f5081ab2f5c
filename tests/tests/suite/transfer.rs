//! Numbers from the host to a device, and back.

use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use half::{bf16, f16};
use protohead::{Error, download, upload};
use protohead_tests::devices::devices;

/// The value behind `T`, on every device that has it.
fn comes_back<T: CubeElement + PartialEq>(values: &[T]) {
    for device in devices() {
        let client = &device.client;
        if !client.properties().supports_type(T::cube_type()) {
            continue;
        }
        let there = upload(client, values, [2, 1, 3]).expect("six values");
        assert_eq!(there.shape().to_vec(), [2, 1, 3]);
        assert_eq!(there.dtype, T::cube_type());
        let back = download::<T>(client, &there).expect("it is contiguous");
        assert_eq!(back, values, "on {}", device.name);
    }
}

#[test]
fn what_is_uploaded_comes_back_in_every_dtype() {
    let floats = [0.5f32, -1.0, 3.25, 0.0, 1e4, -2.0];
    comes_back(&floats);
    comes_back(&floats.map(f16::from_f32));
    comes_back(&floats.map(bf16::from_f32));
    comes_back(&[1i32, -100, 3, 0, i32::MAX, 2]);
    comes_back(&[1i64, -100, 3, 0, i64::MAX, 2]);
    comes_back(&[1u32, 100, 3, 0, u32::MAX, 2]);
}

#[test]
fn what_does_not_fit_is_refused() {
    for device in devices() {
        let client = &device.client;
        let said = |error: Error| error.to_string();
        for shape in [[1, 2, 2], [usize::MAX; 3], [0, 3, 1]] {
            let refused = upload(client, &[1.0f32; 3], shape).map(drop);
            assert_eq!(
                refused.map_err(said),
                Err(format!(
                    "upload: shape {shape:?}, expected 3 elements, as there are values"
                ))
            );
        }
        // A buffer that holds one and a half.
        let bytes = client.create_from_slice(&[1u8; 12]);
        let one = TensorHandle::new_contiguous([1], bytes, i64::cube_type());
        assert_eq!(
            download::<i64>(client, &one),
            Ok(vec![0x0101_0101_0101_0101])
        );
        let mut tensor = upload(client, &[1.0f32; 6], [2, 3]).expect("six values");
        let refused = download::<i32>(client, &tensor).map_err(said);
        assert_eq!(refused, Err("download: dtype f32, expected i32".into()));
        tensor.metadata.strides = vec![1, 2].into();
        let refused = download::<f32>(client, &tensor).expect_err("it lies in columns");
        assert!(matches!(refused, Error::Strides { .. }), "{refused}");
        tensor.metadata.strides = vec![3, 1].into();
        tensor.metadata.shape = vec![3, 3].into();
        let refused = download::<f32>(client, &tensor).expect_err("it leaves its buffer");
        assert!(matches!(refused, Error::Strides { .. }), "{refused}");
    }
}
