//! Tensors and the buffers that they lie in: too short, too large for the device, begun inside, or with more behind.

use cubecl::ir::{AddressType, ElemType, IntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::ClassSums;
use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward, forward_backward};
use protohead::{
    Error, LossOptions, LossOutput, Reduction, Strategy, Upstream, Variant, Wanted, cosine_logits,
    reconstruction,
};
use protohead_tests::devices::{all_runs, devices};
use protohead_tests::problem::{Dtype, download};

use super::{floats, inputs, labels};

#[test]
fn a_handle_shorter_than_its_shape_says_is_refused() {
    for device in devices() {
        let client = &device.client;
        let good = inputs(client);
        let options = Options::default();
        let by_row = Options {
            loss: LossOptions {
                reduction: Reduction::None,
                ..LossOptions::default()
            },
            ..Options::default()
        };
        let short = |shape: &[usize], dtype: Dtype| {
            TensorHandle::new_contiguous(shape.to_vec(), client.empty(4), dtype.elem())
        };
        let refused = |result: Result<(), Error>, says: &str| {
            let error = result.expect_err(says).to_string();
            assert!(error.contains(says), "{error} does not say {says}");
        };
        let step = |inputs: &Inputs, options: &Options, upstream: &Upstream| {
            let output = forward(client, inputs, options)?;
            backward(client, inputs, options, &output, upstream, Wanted::BOTH).map(|_| ())
        };
        let upstream = Upstream::Loss(short(&[2, 4], Dtype::F32));
        refused(step(&good, &by_row, &upstream), "in a buffer of 1 elements");
        let upstream = Upstream::Loss(short(&[2], Dtype::F16));
        refused(step(&good, &options, &upstream), "upstream gradient: dtype");
        let mut output = forward(client, &good, &options).expect("valid");
        let back = |output: &LossOutput| {
            let upstream = Upstream::default();
            backward(client, &good, &options, output, &upstream, Wanted::BOTH).map(|_| ())
        };
        let mut others = good.clone();
        others.embeddings = floats(client, &[2, 3, 5]);
        others.labels = labels(client, &[0, 1, 2]);
        let of_others = forward(client, &others, &options).expect("valid");
        refused(
            back(&of_others),
            "the number of rows is 4, but was 3 in the forward pass",
        );
        let status = std::mem::replace(&mut output.status, floats(client, &[1]));
        refused(back(&output), "status: dtype");
        refused(output.read_total(client).map(|_| ()), "status: dtype");
        refused(output.check(client), "status: dtype");
        output.status = status;
        assert_eq!(back(&output), Ok(()));
        let total = std::mem::replace(&mut output.total, floats(client, &[2]));
        refused(output.read(client).map(|_| ()), "total: shape [2]");
        output.total = total;
        let loss = std::mem::replace(&mut output.loss, labels(client, &[0, 1]));
        refused(output.read_loss(client).map(|_| ()), "a result: dtype");
        output.loss = loss;
        assert_eq!(output.read(client).map(|_| ()), Ok(()));

        let whole = floats(client, &[4, 5]);
        let parts = reconstruction::Inputs {
            whole: whole.clone(),
            first: whole.clone(),
            second: whole,
        };
        let upstream = TensorHandle::new_contiguous([1], client.empty(0), Dtype::F32.elem());
        let gradients = reconstruction::backward(
            client,
            &parts,
            &Default::default(),
            &Upstream::Loss(upstream),
            reconstruction::Wanted::ALL,
        );
        refused(gradients.map(|_| ()), "upstream gradient: strides");

        for offset in [2, 20, 1000] {
            let mut elsewhere = good.clone();
            elsewhere.labels.handle = elsewhere.labels.handle.offset_start(offset);
            refused(
                step(&elsewhere, &options, &Upstream::default()),
                "labels: strides",
            );
            let mut elsewhere = good.clone();
            elsewhere.weights.handle = elsewhere.weights.handle.offset_start(offset);
            refused(
                step(&elsewhere, &options, &Upstream::default()),
                "class weights: strides",
            );
        }
    }
}

/// Software Vulkan has buffers of 128 MiB, as much as WebGPU guarantees; others have what takes too long to fill.
#[test]
fn rows_whose_packed_copy_no_buffer_of_the_device_holds_are_refused() {
    for run in all_runs() {
        let page = run.client.properties().memory.max_page_size;
        if page > 1 << 30 || run.strategy == Strategy::Forced(Variant::Small) {
            continue;
        }
        // Packed, a row has 64 columns.
        let most = page as usize / 64 / 4;
        let of = |rows: usize| {
            let inputs = cosine_logits::Inputs {
                embeddings: floats(run.client, &[1, rows, 2]),
                weights: floats(run.client, &[1, 1, 2]),
            };
            let options = cosine_logits::Options {
                strategy: run.strategy,
                ..Default::default()
            };
            let logits = cosine_logits::forward(run.client, &inputs, &options)?;
            Ok(download(run.client, &logits).len())
        };
        assert_eq!(of(most), Ok(most), "on {run}");
        assert_eq!(
            of(most + 64),
            Err(Error::TooLarge {
                operand: "the packed embeddings",
                elements: (most as u128 + 64) * 64,
                most: u128::from(page) / 4,
            }),
            "on {run}"
        );
    }
}

/// Labels may lie in a buffer that holds more, and no whole number of them.
#[test]
fn a_bad_label_is_told_whatever_lies_behind_the_labels() {
    for device in devices() {
        let client = &device.client;
        let long = ElemType::Int(IntKind::I64);
        if !client.properties().supports_type(long) {
            continue;
        }
        let mut bytes: Vec<u8> = [0i64, 1, 9, 2]
            .iter()
            .flat_map(|l| l.to_le_bytes())
            .collect();
        bytes.extend([1, 2, 3, 4]);
        let handle = client.create_from_slice(&bytes);
        let inputs = Inputs {
            labels: TensorHandle::new_contiguous([4], handle, long),
            ..inputs(client)
        };
        let output = forward(client, &inputs, &Options::default()).expect("shapes fit");
        assert_eq!(
            output.check(client),
            Err(Error::Label {
                row: 2,
                label: 9,
                active: 3,
                rows: 1
            }),
            "{}",
            device.name
        );
    }
}

/// wgpu binds buffers at its own alignment only, and would panic.
#[test]
fn a_tensor_that_begins_inside_its_buffer_is_read_or_refused() {
    for device in devices() {
        let client = &device.client;
        let good = inputs(client);
        let mut elsewhere = good.clone();
        let values: Vec<f32> = (0..43).map(|i| i as f32).collect();
        let inside = client
            .create_from_slice(f32::as_bytes(&values))
            .offset_start(12);
        elsewhere.embeddings.handle = inside;
        let result = forward(client, &elsewhere, &Options::default()).map(|_| ());
        match device.name {
            "wgpu" => assert_eq!(
                result,
                Err(Error::Offset {
                    operand: "embeddings",
                    offset: 12,
                    alignment: client.properties().memory.alignment
                })
            ),
            _ => assert_eq!(result, Ok(()), "{}", device.name),
        }
    }
}

/// Rows and classes lie in one element, so that nothing but the result is large.
#[test]
fn results_that_no_buffer_of_the_device_holds_are_refused() {
    const CLASSES: usize = 1 << 20;
    for device in devices() {
        let client = &device.client;
        let repeated = |rows: usize| {
            let mut tensor = floats(client, &[1, 1, 1]);
            tensor.metadata.shape = vec![1, rows, 1].into();
            tensor.metadata.strides = vec![0, 0, 1].into();
            tensor
        };
        let page = client.properties().memory.max_page_size / 4;
        // A grid beyond the last element is within reach of 32-bit indices too.
        let narrow = page.min(u64::from(u32::MAX) - 65_535 * 256);
        let on_cpu = client.properties().hardware.num_cpu_cores.is_some();
        let wide = !on_cpu && client.properties().supports_address(AddressType::U64);
        let rows_beyond = |most: u64| most as usize / CLASSES + 1;
        let too_large = |operand, most: u64| Error::TooLarge {
            operand,
            elements: (rows_beyond(most) * CLASSES) as u128,
            most: most.into(),
        };
        let most = if wide { page } else { narrow };
        let inputs = cosine_logits::Inputs {
            embeddings: repeated(rows_beyond(most)),
            weights: repeated(CLASSES),
        };
        let logits = cosine_logits::forward(client, &inputs, &Default::default());
        let refused = logits.map(drop).expect_err("must be refused");
        assert_eq!(refused, too_large("logits", most), "{}", device.name);
        let rows = rows_beyond(narrow);
        let sums = ClassSums::new(client, 1, CLASSES, rows, &Default::default());
        let refused = sums.map(drop).expect_err("must be refused");
        assert_eq!(refused, too_large("class sums", narrow), "{}", device.name);
        if page < narrow {
            // Class weights in one element, of which one takes part: it is their gradient that is large.
            let inputs = cosine_logits::Inputs {
                embeddings: floats(client, &[1, 1, 1]),
                weights: repeated(page as usize + 1),
            };
            let options = cosine_logits::Options {
                active: Some(1),
                ..Default::default()
            };
            let logits = cosine_logits::forward(client, &inputs, &options).map(drop);
            assert_eq!(logits, Ok(()), "{}", device.name);
            let grad = floats(client, &[1, 1, 1]);
            let back = |wanted| {
                cosine_logits::backward(client, &inputs, &options, &grad, wanted).map(drop)
            };
            assert_eq!(back(Wanted::EMBEDDINGS), Ok(()), "{}", device.name);
            let expected = Error::TooLarge {
                operand: "the gradient of the class weights",
                elements: u128::from(page) + 1,
                most: page.into(),
            };
            assert_eq!(back(Wanted::BOTH), Err(expected.clone()), "{}", device.name);
            let inputs = Inputs {
                embeddings: inputs.embeddings,
                weights: inputs.weights,
                labels: labels(client, &[0]),
            };
            let options = Options {
                active: Some(1),
                ..Options::default()
            };
            let output = forward(client, &inputs, &options).expect("it is not asked for");
            let upstream = Upstream::default();
            let back = backward(client, &inputs, &options, &output, &upstream, Wanted::BOTH);
            assert_eq!(back.map(drop), Err(expected.clone()), "{}", device.name);
            let both = forward_backward(client, &inputs, &options, &upstream, Wanted::BOTH);
            assert_eq!(both.map(drop), Err(expected), "{}", device.name);
            let whole = TensorHandle::new(
                floats(client, &[1]).handle,
                vec![page as usize + 1, 1],
                vec![0, 1],
                Dtype::F32.elem(),
            );
            let inputs = reconstruction::Inputs {
                whole: whole.clone(),
                first: whole.clone(),
                second: whole,
            };
            let options = reconstruction::Options::default();
            let all = reconstruction::Wanted::ALL;
            let back = reconstruction::backward(client, &inputs, &options, &upstream, all);
            let too_large = |operand| {
                Err(Error::TooLarge {
                    operand,
                    elements: u128::from(page) + 1,
                    most: page.into(),
                })
            };
            assert_eq!(back.map(drop), too_large("a gradient"), "{}", device.name);
            let cosines = reconstruction::forward(client, &inputs, &options);
            assert_eq!(
                cosines.map(drop),
                too_large("the cosines"),
                "{}",
                device.name
            );
        }
    }
}
