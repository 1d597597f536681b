import { list } from '../format.ts';
import { type Arch, type BackendName, Kvm, type VmDescription, type VmType } from '../index.ts';
import { type MemoryMap, memoryMap } from './memory_map.ts';
import type { DemoOptions } from './options.ts';
import { layout, privateTour, type Step, sharedTour } from './tour.ts';

/** Acts on one VM of one kernel. */
export interface Part {
  readonly backend: BackendName;
  readonly kernel: string;
  readonly arch: Arch;
  readonly pageSize: number;
  readonly vmType: VmType;
  /** Whether VMs of this type have private memory here. */
  readonly privateMemory: boolean;
  /** What a reader should know before: why this kernel, what is not there. */
  readonly notes: readonly string[];
}

/** A step, and the memory after it. */
export interface Scene extends Step {
  readonly map: MemoryMap;
  readonly memslots: VmDescription['memslots'];
  /** Bytes really held. */
  readonly held: VmDescription['residentBytes'];
}

export type DemoEvent =
  | { readonly kind: 'part'; readonly part: Part }
  | { readonly kind: 'scene'; readonly part: Part; readonly scene: Scene };

/**
 * The tour, as it happens. On a host whose KVM has no private memory it goes on, on the software kernel, with what is missing, unless a
 * backend or a VM type was asked for.
 */
export async function* demo(options: DemoOptions): AsyncGenerator<DemoEvent> {
  const { open, memory } = options;
  using kvm = Kvm.open(open);
  const type = options.type ?? bestType(kvm);
  const goesOn = open.backend === 'auto' && kvm.backend === 'kvm' && options.type === undefined;
  const done = yield* perform(kvm, type, memory, goesOn);
  if (done.privateMemory || !goesOn) return;
  using model = Kvm.open({ ...open, backend: 'software' });
  yield* perform(model, 'sw-protected', memory, false);
}

async function* perform(kvm: Kvm, type: VmType, memory: number, goesOn: boolean): AsyncGenerator<DemoEvent, Part> {
  using vm = kvm.createVm({ type });
  const privateMemory = vm.capabilities.conversion !== 'none';
  const part: Part = {
    backend: kvm.backend,
    kernel: kvm.kernelRelease,
    arch: kvm.arch,
    pageSize: kvm.pageSize,
    vmType: type,
    privateMemory,
    notes: [...kernelNotes(kvm), ...(privateMemory ? [] : [missing(kvm, type, goesOn)])],
  };
  yield { kind: 'part', part };
  const tour = privateMemory ? privateTour : sharedTour;
  for await (const step of tour(vm, layout(memory))) {
    const { memslots, residentBytes: held } = vm.describe();
    yield { kind: 'scene', part, scene: { ...step, map: memoryMap(vm), memslots, held } };
  }
  return part;
}

function kernelNotes({ backend, fallbackReason }: Kvm): string[] {
  if (backend === 'kvm') return [];
  return [
    ...(fallbackReason ? [`KVM cannot be used: ${fallbackReason.message}.`] : []),
    'Simulated: a model of KVM’s rules answers; the host’s KVM has no part in it.',
  ];
}

function missing(kvm: Kvm, type: VmType, goesOn: boolean): string {
  const types = list([...kvm.vmTypes].map((name) => `'${name}'`));
  const what =
    bestType(kvm) === 'default'
      ? `There is no private memory here: the only VM type is ${types}.`
      : `VMs of type '${type}' have no private memory; the types here are ${types}.`;
  const next = goesOn
    ? 'Memslots, host access and holes are shown on the real KVM; the private part follows on the software kernel.'
    : 'The private part: guest-memfd demo --backend software --type sw-protected';
  return `${what} ${next}`;
}

/** The type to show when none is asked for: one with private memory that needs no preparation. */
function bestType({ vmTypes }: Kvm): VmType {
  return vmTypes.has('sw-protected') ? 'sw-protected' : 'default';
}
