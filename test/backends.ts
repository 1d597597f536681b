import { readdirSync, readlinkSync } from 'node:fs';
import type { Test } from 'tap';
import { type GuestMemfd, type HostMemory, Kvm, type KvmError, type ModelOptions, type Vm } from '../lib/index.ts';
import { unicornLibrary } from '../lib/kernel/software/unicorn_engine.ts';
import { realKernel } from './kvm_host.ts';
import { onSoftware } from './pace.ts';

/** A kernel that the tests of the objects run on, and what it can do: so that a missing answer is noticed, not skipped. */
export interface Backend {
  readonly name: string;
  readonly model?: ModelOptions;
  /** It has a VM type with private memory. */
  readonly hasPrivate: boolean;
  readonly isArm: boolean;
  open(): Kvm;
}

const models: readonly ModelOptions[] = [
  { arch: 'x86_64', kernel: '7.3' },
  { arch: 'x86_64', kernel: '6.18', swProtected: false, tdp: false },
  { arch: 'aarch64', kernel: '7.3', pageSize: 16384 },
];

function software(model: ModelOptions): Backend {
  return {
    name: `software ${model.kernel} ${model.arch}`,
    model,
    hasPrivate: model.arch === 'x86_64' && model.swProtected !== false,
    isArm: model.arch === 'aarch64',
    open: () => Kvm.open({ backend: 'software', model }),
  };
}

/** Where /dev/kvm opens the real one has to work: an addon that was not built is a failure, unless nothing could build it. */
function real(): Backend[] {
  const kernel = realKernel();
  if ('reason' in kernel) {
    if (kernel.excusable) return [];
    throw new Error(kernel.reason);
  }
  using kvm = Kvm.open({ backend: 'kvm' });
  return [
    {
      name: 'kvm',
      hasPrivate: kvm.vmTypes.has('sw-protected'),
      isArm: kvm.arch === 'aarch64',
      open: () => Kvm.open({ backend: 'kvm' }),
    },
  ];
}

export const backends: readonly Backend[] = [...real(), ...(onSoftware ? models.map(software) : [])];
/** Those whose vCPUs carry out any guest code: the software kernel needs libunicorn for it. */
export const codeBackends = backends.filter(({ model }) => !model || typeof unicornLibrary() !== 'string');
export const onKvm = backends.some(({ name }) => name === 'kvm');
if (!onSoftware && !onKvm) throw new Error('real KVM was asked for, and there is none');
/** For a program in a process of its own. */
export const backendNames: readonly string[] = [...(onKvm ? ['kvm'] : []), ...(onSoftware ? ['software'] : [])];

/** An opened Kvm, with a VM and what tests need most. */
export interface World {
  readonly backend: Backend;
  readonly kvm: Kvm;
  readonly vm: Vm;
  /** Bytes of a page. */
  readonly P: number;
  host(pages: number): HostMemory;
  /** A guest_memfd that the host may touch. */
  shared(pages: number): GuestMemfd;
  /** A guest_memfd that the host may not touch and that every architecture can bind. */
  closed(pages: number): GuestMemfd;
}

function world(backend: Backend, kvm: Kvm, vm: Vm): World {
  const P = kvm.pageSize;
  return {
    backend,
    kvm,
    vm,
    P,
    host: (pages) => kvm.createHostMemory({ size: pages * P }),
    shared: (pages) => vm.createGuestMemfd({ size: pages * P, mmap: true, initShared: true }),
    closed: (pages) => vm.createGuestMemfd({ size: pages * P, mmap: backend.isArm }),
  };
}

/** Runs a test on every backend: each in a subtest with a VM of its own, after which no fd of this process may be left. */
export async function everywhere(
  t: Test,
  title: string,
  run: (t: Test, world: World) => void | Promise<void>,
  on: readonly Backend[] = backends,
): Promise<void> {
  for (const backend of on) {
    await t.test(`${title} (${backend.name})`, async (t) => {
      const before = openFiles();
      const kvm = backend.open();
      try {
        await run(t, world(backend, kvm, kvm.createVm()));
      } finally {
        kvm.close();
      }
      t.same(openFiles(), before, 'every file is closed');
    });
  }
}

/** A test of conversions: a VM with private memory. */
export async function withPrivate(
  t: Test,
  title: string,
  run: (t: Test, world: World) => void | Promise<void>,
): Promise<void> {
  for (const backend of backends.filter(({ hasPrivate }) => hasPrivate)) {
    await t.test(`${title} (${backend.name})`, async (t) => {
      const kvm = backend.open();
      try {
        await run(t, world(backend, kvm, kvm.createVm({ type: 'sw-protected' })));
      } finally {
        kvm.close();
      }
    });
  }
}

/** What the fds of this process that have to do with KVM or memory refer to. Node's own come and go. */
export function openFiles(isMore: (target: string) => boolean = () => false): string[] {
  return readdirSync('/proc/self/fd')
    .flatMap((fd) => {
      try {
        return readlinkSync(`/proc/self/fd/${fd}`);
      } catch {
        return [];
      }
    })
    .filter((target) => isMore(target) || (/kvm|memfd:|gmem/.test(target) && !target.endsWith('.node')))
    .sort();
}

/** The error a call throws, or rejects with; none is a failure. */
export function errorOf(run: () => unknown): KvmError {
  try {
    run();
  } catch (error) {
    return error as KvmError;
  }
  throw new Error('nothing was thrown');
}

export async function rejection(promise: Promise<unknown>): Promise<KvmError> {
  try {
    await promise;
  } catch (error) {
    return error as KvmError;
  }
  throw new Error('nothing was thrown');
}

/** Asserts that a call is refused with a code, and that the message says each of these things. */
export function refused(t: Test, run: () => unknown, code: string, ...says: (string | RegExp)[]): KvmError {
  const error = errorOf(run);
  t.equal(error.code, code, `${code}: ${error.message}`);
  for (const what of says) t.match(error.message, what);
  return error;
}
