//! PTX that CubeCL has no operation for, as operations of its intermediate representation that become LLVM's inline assembly.

use cubecl::ir::Scope;
use cubecl::ir::attributes::IndexAttr;
use cubecl::ir::interfaces::side_effects::{MemoryEffect, MemoryEffectsOp};
use cubecl::ir::prelude::*;
use cubecl::ir::{AddressSpace, CanMaterialize, Pure};
use cubecl_llvm::shared::to_llvm::ToLLVMDialect;
use pliron::builtin::attributes::StringAttr;
use pliron::builtin::types::{FP32Type, IntegerType, Signedness};
use pliron::opts::dce::SideEffects;
use pliron_llvm::llvm_attrs::{LlvmAttrValue, LlvmAttributesAttr};
use pliron_llvm::op_interfaces::CastOpInterface;
use pliron_llvm::ops as llvm;
use pliron_llvm::types::{PointerType, StructLayout, StructType, VoidType};

/// What PTX works on. In its text the sums are `$0` and on; then come the same again, as LLVM names what is both read and written
/// twice; then the pointers, as 32-bit addresses of shared memory and 64-bit ones of global memory.
#[derive(Default)]
pub(super) struct Operands {
    /// An array of f32 that is read and written, and its length.
    pub sums: Option<(Value, usize)>,
    /// Pointers to shared memory, which the text may read and write.
    pub shared: Vec<Value>,
    /// Pointers to global memory, which it may read.
    pub global: Vec<Value>,
}

/// PTX with effects: its operands are the array, if there is one, and the pointers.
#[pliron_op(
    name = "protohead.ptx",
    format,
    attributes = (
        protohead_ptx_text: StringAttr,
        protohead_ptx_sums: IndexAttr,
        protohead_ptx_shared: IndexAttr
    ),
    verifier = "succ"
)]
#[op_traits(CanMaterialize)]
pub(super) struct PtxOp;

/// Puts an operation of PTX into the kernel.
pub(super) fn register(scope: &Scope, text: &str, operands: Operands) {
    let op = PtxOp::new(scope.ctx_mut(), text.to_owned(), operands);
    scope.register(&op);
}

impl PtxOp {
    pub(super) fn new(ctx: &mut Context, text: String, operands: Operands) -> Self {
        let Operands {
            sums,
            shared,
            global,
        } = operands;
        let values = sums.iter().map(|(array, _)| *array);
        let values = values
            .chain(shared.iter().chain(&global).copied())
            .collect();
        let op = Operation::new(ctx, Self::get_concrete_op_info(), vec![], values, vec![], 0);
        let op = Self { op };
        op.set_attr_protohead_ptx_text(ctx, text.into());
        op.set_attr_protohead_ptx_sums(ctx, IndexAttr(sums.map_or(0, |(_, count)| count)));
        op.set_attr_protohead_ptx_shared(ctx, IndexAttr(shared.len()));
        op
    }

    fn operands(&self, ctx: &Context) -> Operands {
        let mut values = self
            .get_operation()
            .deref(ctx)
            .operands()
            .collect::<Vec<_>>();
        let count = self
            .get_attr_protohead_ptx_sums(ctx)
            .map_or(0, |attr| attr.0);
        let shared = self
            .get_attr_protohead_ptx_shared(ctx)
            .map_or(0, |attr| attr.0);
        let sums = (count > 0).then(|| (values.remove(0), count));
        let global = values.split_off(shared);
        Operands {
            sums,
            shared: values,
            global,
        }
    }
}

#[op_interface_impl]
impl SideEffects for PtxOp {
    fn has_side_effects(&self, _ctx: &Context) -> bool {
        true
    }
}

#[op_interface_impl]
impl MemoryEffectsOp for PtxOp {
    fn memory_effects(&self, ctx: &Context) -> Vec<MemoryEffect> {
        let operands = self.operands(ctx);
        let mut effects = vec![
            MemoryEffect::ReadAllInSpace(AddressSpace::Shared),
            MemoryEffect::WriteAllInSpace(AddressSpace::Shared),
        ];
        if let Some((array, _)) = operands.sums {
            effects.extend([MemoryEffect::Read(array), MemoryEffect::Write(array)]);
        }
        effects.extend(operands.global.into_iter().map(MemoryEffect::Read));
        effects
    }
}

/// LLVM's address spaces of NVIDIA GPUs.
const GLOBAL: u32 = 1;
const SHARED: u32 = 3;

#[op_interface_impl]
impl ToLLVMDialect for PtxOp {
    fn rewrite(
        &self,
        ctx: &mut Context,
        rewriter: &mut DialectConversionRewriter,
        _operands: &OperandsInfo,
    ) -> Result<()> {
        let Operands {
            sums,
            shared,
            global,
        } = self.operands(ctx);
        let text = self.get_attr_protohead_ptx_text(ctx);
        let text = text.map_or_else(String::new, |text| text.clone().into());
        let float: TypeHandle = FP32Type::get(ctx).into();
        let mut inputs = Vec::new();
        let mut places = Vec::new();
        if let Some((array, count)) = sums {
            for sum in 0..count as u32 {
                let index = vec![llvm::GepIndex::Constant(sum)];
                let place = llvm::GetElementPtrOp::new(ctx, array, index, float);
                rewriter.insert_op(ctx, &place);
                let place = place.get_result(ctx);
                let load = llvm::LoadOp::new(ctx, place, float);
                rewriter.insert_op(ctx, &load);
                places.push(place);
                inputs.push(load.get_result(ctx));
            }
        }
        let pointers = shared.iter().map(|pointer| (*pointer, SHARED, 32));
        for (pointer, space, bits) in pointers.chain(global.iter().map(|p| (*p, GLOBAL, 64))) {
            let in_space: TypeHandle = PointerType::get(ctx, space).into();
            let number = IntegerType::get(ctx, bits, Signedness::Signless).into();
            let pointer = llvm::AddrSpaceCastOp::new(ctx, pointer, in_space);
            rewriter.insert_op(ctx, &pointer);
            let address = llvm::PtrToIntOp::new(ctx, pointer.get_result(ctx), number);
            rewriter.insert_op(ctx, &address);
            inputs.push(address.get_result(ctx));
        }
        let constraints: Vec<_> = (0..places.len())
            .map(|_| "=f".to_owned())
            .chain((0..places.len()).map(|sum| sum.to_string()))
            .chain(shared.iter().map(|_| "r".to_owned()))
            .chain(global.iter().map(|_| "l".to_owned()))
            .chain(["~{memory}".to_owned()])
            .collect();
        let results = match places.len() {
            0 => VoidType::get(ctx).into(),
            count => {
                StructType::get_unnamed(ctx, (vec![float; count], StructLayout::Unpacked)).into()
            }
        };
        let asm = llvm::InlineAsmOp::new(ctx, results, inputs, &text, &constraints.join(","), true);
        // What all units of a plane have to do together, LLVM may not make depend on conditions that differ between them.
        let mut attributes = LlvmAttributesAttr::new();
        attributes.set("convergent", LlvmAttrValue::Unit);
        asm.set_attr_llvm_inline_asm_attrs(ctx, attributes);
        rewriter.insert_op(ctx, &asm);
        let results = asm.get_result(ctx);
        for (sum, place) in places.into_iter().enumerate() {
            let result = llvm::ExtractValueOp::new(ctx, results, vec![sum as u32])?;
            rewriter.insert_op(ctx, &result);
            let store = llvm::StoreOp::new(ctx, result.get_result(ctx), place);
            rewriter.insert_op(ctx, &store);
        }
        rewriter.erase_operation(ctx, self.get_operation());
        Ok(())
    }
}

/// `2^x` of an f32, off by 2 units in the last place at most ([PTX ISA](https://docs.nvidia.com/cuda/parallel-thread-execution/), "ex2"). Denormal
/// numbers count as 0.
#[pliron_op(name = "protohead.ex2", format, verifier = "succ", interfaces = [OneResultInterface, NResultsInterface<1>])]
#[op_traits(CanMaterialize, Pure)]
pub(super) struct Ex2Op;

impl Ex2Op {
    pub(super) fn new(ctx: &mut Context, x: Value) -> Self {
        let info = Self::get_concrete_op_info();
        let result = x.get_type(ctx);
        let op = Operation::new(ctx, info, vec![result], vec![x], vec![], 0);
        Self { op }
    }
}

#[op_interface_impl]
impl ToLLVMDialect for Ex2Op {
    fn rewrite(
        &self,
        ctx: &mut Context,
        rewriter: &mut DialectConversionRewriter,
        _operands: &OperandsInfo,
    ) -> Result<()> {
        let op = self.get_operation();
        let x = op.deref(ctx).get_operand(0);
        let float = FP32Type::get(ctx).into();
        let text = "ex2.approx.ftz.f32 $0, $1;";
        let asm = llvm::InlineAsmOp::new(ctx, float, vec![x], text, "=f,f", false);
        rewriter.insert_op(ctx, &asm);
        rewriter.replace_operation(ctx, op, asm.get_operation());
        Ok(())
    }
}
