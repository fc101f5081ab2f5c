use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;
use cubecl::ir::*;
use protohead::cosine_cross_entropy::*;
use protohead::*;
use protohead_reference as r;
fn rnd(n: usize, mut s: u64) -> Vec<f32> { (0..n).map(|_| { s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); ((s >> 40) as f32 / (1u64<<24) as f32) - 0.5 }).collect() }
fn main() {
    let client = cubecl::Device::cpu().unwrap().client();
    println!("{:?}", client.properties().hardware);
    let f32t = ElemType::Float(FloatKind::F32);
    for (h, n, k, c, d, check) in [(2usize, 37usize, 19usize, 23usize, 33usize, true), (3, 128, 20, 35, 256, true), (3,1024,1000,1000,256,false), (3,1024,10000,10000,512,false)] {
        let x = rnd(h*n*d, 1); let w = rnd(h*c*d, 2);
        let labels: Vec<i32> = (0..n).map(|i| if i % 7 == 3 { -100 } else { ((i*31) % k) as i32 }).collect();
        let inputs = Inputs {
            embeddings: TensorHandle::new_contiguous([h,n,d], client.create_from_slice(f32::as_bytes(&x)), f32t),
            weights: TensorHandle::new_contiguous([h,c,d], client.create_from_slice(f32::as_bytes(&w)), f32t),
            labels: TensorHandle::new_contiguous([n], client.create_from_slice(i32::as_bytes(&labels)), ElemType::Int(IntKind::I32)),
        };
        let o = Options { active: Some(k), loss: LossOptions { label_smoothing: 0.1, ..Default::default() }, ..Default::default() };
        for i in 0..6 {
            let t = std::time::Instant::now();
            let out = forward(&client, &inputs, &o).unwrap();
            let total = out.read_total(&client).unwrap();
            let tf = t.elapsed();
            let g = backward(&client, &inputs, &o, &out, &Upstream::Total(1.0), true, true).unwrap();
            let gx = client.read_one(g.embeddings.unwrap().handle).unwrap();
            let gw = client.read_one(g.weights.unwrap().handle).unwrap();
            let t = t.elapsed();
            println!("{:?} fwd {tf:?} total {t:?} {:.0} GF/s (6HNKD)", (h,n,k,d), 6.0*(h*n*k*d) as f64/t.as_secs_f64()/1e9);
            if i == 0 && check {
                let s = r::Sizes { heads: h, rows: n, dim: d, classes: c, active: k };
                let x: Vec<f64> = x.iter().map(|&v| v as f64).collect(); let w: Vec<f64> = w.iter().map(|&v| v as f64).collect();
                let l: Vec<i64> = labels.iter().map(|&v| v as i64).collect();
                let ro = r::LossOptions { reduction: r::Reduction::Mean, label_smoothing: 0.1f32 as f64, ignore_index: -100, head_weights: vec![1.0; h] };
                let f = r::cosine_cross_entropy(&x, &w, &l, s, 16.0, &ro);
                let (dx, dw) = r::cosine_cross_entropy_backward(&x, &w, &l, s, 16.0, &ro, &r::Upstream::Total(1.0));
                println!("total {total} vs {}", f.total);
                let err = |a: &[f32], b: &[f64]| { let e: f64 = a.iter().zip(b).map(|(a,b)| (*a as f64-b).powi(2)).sum::<f64>().sqrt(); e / b.iter().map(|b| b*b).sum::<f64>().sqrt() };
                println!("dx {:.2e} dw {:.2e} pred ok {}", err(f32::from_bytes(&gx), &dx), err(f32::from_bytes(&gw), &dw), out.read_predictions(&client).unwrap() == f.predictions);
            }
        }
    }
}
