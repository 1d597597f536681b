import type { FileKind } from '../state.ts';

/** How long the struct of a request is: as the request number says, or that and an array behind it. */
export type StructKind = 'fixed' | 'array';

/**
 * Requests whose argument is a struct of plain data: no pointers, so a kernel that carries one out touches the struct and nothing else.
 * By the kind of fd, because a number may mean something else on another: 0x4010aeab is KVM_GET_ONE_REG, with a pointer, on a vCPU. The
 * numbers of x86-64 and of arm64 exclude each other where their structs differ.
 */
export const structRequests: ReadonlyMap<FileKind, ReadonlyMap<number, StructKind>> = new Map([
  [
    'kvm',
    table({
      fixed: [
        0x8008ae9d, // X86_GET_MCE_CAP_SUPPORTED
      ],
      array: [
        0xc004ae02, // GET_MSR_INDEX_LIST
        0xc008ae05, // GET_SUPPORTED_CPUID
        0xc008ae09, // GET_EMULATED_CPUID
        0xc004ae0a, // GET_MSR_FEATURE_INDEX_LIST
        0xc008ae88, // GET_MSRS
        0xc008aec1, // GET_SUPPORTED_HV_CPUID
      ],
    }),
  ],
  [
    'vm',
    table({
      fixed: [
        0x4008ae48, // SET_IDENTITY_MAP_ADDR
        0x4008ae61, // IRQ_LINE
        0xc008ae67, // IRQ_LINE_STATUS
        0xc208ae62, // GET_IRQCHIP
        0x8208ae63, // SET_IRQCHIP
        0x4010ae67, // REGISTER_COALESCED_MMIO
        0x4010ae68, // UNREGISTER_COALESCED_MMIO
        0x4020ae76, // IRQFD
        0x4040ae77, // CREATE_PIT2
        0x4040ae79, // IOEVENTFD
        0x4030ae7b, // SET_CLOCK
        0x8030ae7c, // GET_CLOCK
        0x8070ae9f, // GET_PIT2
        0x4070aea0, // SET_PIT2
        0x4020aea5, // SIGNAL_MSI
        0x4010aeab, // ARM_SET_DEVICE_ADDR
        0x8020aeaf, // ARM_PREFERRED_TARGET
        0x4010aeb5, // ARM_SET_COUNTER_OFFSET
      ],
      array: [
        0x4008ae6a, // SET_GSI_ROUTING
      ],
    }),
  ],
  [
    'vcpu',
    table({
      fixed: [
        0x8090ae81, // GET_REGS
        0x4090ae82, // SET_REGS
        0x8138ae83, // GET_SREGS
        0x4138ae84, // SET_SREGS
        0xc018ae85, // TRANSLATE
        0x4004ae86, // INTERRUPT
        0x81a0ae8c, // GET_FPU
        0x41a0ae8d, // SET_FPU
        0x8400ae8e, // GET_LAPIC
        0x4400ae8f, // SET_LAPIC
        0xc028ae92, // TPR_ACCESS_REPORTING
        0x4008ae93, // SET_VAPIC_ADDR
        0x8004ae98, // GET_MP_STATE
        0x4004ae99, // SET_MP_STATE
        0x4048ae9b, // SET_GUEST_DEBUG, x86
        0x4208ae9b, // SET_GUEST_DEBUG, arm64
        0x4008ae9c, // X86_SETUP_MCE
        0x4040ae9e, // X86_SET_MCE
        0x8040ae9f, // GET_VCPU_EVENTS
        0x4040aea0, // SET_VCPU_EVENTS
        0x8080aea1, // GET_DEBUGREGS
        0x4080aea2, // SET_DEBUGREGS
        0x9000aea4, // GET_XSAVE
        0x5000aea5, // SET_XSAVE
        0x8188aea6, // GET_XCRS
        0x4188aea7, // SET_XCRS
        0x4020aeae, // ARM_VCPU_INIT
        0x4004aec2, // ARM_VCPU_FINALIZE
        0x8140aecc, // GET_SREGS2
        0x4140aecd, // SET_SREGS2
      ],
      array: [
        0xc008ae88, // GET_MSRS
        0x4008ae89, // SET_MSRS
        0x4008ae90, // SET_CPUID2
        0xc008ae91, // GET_CPUID2
        0xc008aeb0, // GET_REG_LIST
        0xc080aebe, // GET_NESTED_STATE
        0x4080aebf, // SET_NESTED_STATE
        0xc008aec1, // GET_SUPPORTED_HV_CPUID
        0x9000aecf, // GET_XSAVE2
      ],
    }),
  ],
] satisfies [FileKind, ReadonlyMap<number, StructKind>][]);

function table({ fixed, array }: { fixed: readonly number[]; array: readonly number[] }): Map<number, StructKind> {
  const kinds = new Map<number, StructKind>(fixed.map((request) => [request, 'fixed']));
  for (const request of array) kinds.set(request, 'array');
  return kinds;
}
