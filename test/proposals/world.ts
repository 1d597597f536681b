import type { Test } from 'tap';
import { softwareKernel } from '../../lib/kernel/index.ts';
import type { LinuxKernel } from '../../lib/kernel/linux/linux_kernel.ts';
import type { SoftwareKernel } from '../../lib/kernel/software/software_kernel.ts';
import type { ModelOptions, Proposal } from '../../lib/model_options.ts';
import { KVM_MEMORY_ATTRIBUTE_PRIVATE } from '../../lib/uapi.ts';
import { describe, INIT_SHARED, MMAP, Scenario } from '../conformance/scenario.ts';
import { realKernel } from '../kvm_host.ts';

/** A VM type with private memory. */
export const SW_PROTECTED = 1;
const alone = (): never => {
  throw new Error('these tests have no other process');
};

/** A software kernel with these proposals, and a scenario on it that is closed when the test ends. */
export class World extends Scenario {
  override readonly kernel: SoftwareKernel;

  constructor(t: Test, proposals: readonly Proposal[], model: ModelOptions = {}) {
    const kernel = softwareKernel({ ...model, proposals });
    super(kernel, alone);
    this.kernel = kernel;
    t.teardown(() => {
      for (const problem of this.close()) t.fail(`cannot be closed: ${problem}`);
    });
  }

  /** A guest_memfd that host and guest share at first, in a VM with private memory. */
  shared(vm: number, pages = 16): number {
    return this.gmem(vm, pages, MMAP | INIT_SHARED);
  }

  /** 0; or the errno, and the page that was in the way where one is named. Pages, not bytes. */
  convert(fd: number, from: number, pages: number, to: 'private' | 'shared', flags = 0): string | number {
    const args: { offset: number; size: number; attributes: number; flags: number; errorOffset?: bigint } = {
      offset: from * this.P,
      size: pages * this.P,
      attributes: to === 'private' ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0,
      flags,
    };
    const result = this.kernel.setMemoryAttributes2(fd, args);
    if (result === 0) return 0;
    const where = args.errorOffset === undefined ? '' : ` at ${Number(args.errorOffset) / this.P}`;
    return describe(result) + where;
  }

  /** The private pages of a file as [first, end). */
  privatePages(fd: number): [number, number][] {
    return [...(this.kernel.privatePages(fd) ?? [])].map(({ start, end }) => [start, end]);
  }

  /** Holds pages, or throws. */
  pin(fd: number, from: number, pages: number): () => void {
    const release = this.kernel.pinPages(fd, from * this.P, pages * this.P);
    if (typeof release === 'number') throw new Error(`setup: cannot pin: ${describe(release)}`);
    return release;
  }
}

/** Runs a test on the real kernel where there is one: none of the proposals is in it, and it must say so like the model without them. */
export function onLinux(t: Test, run: (s: Scenario & { readonly kernel: LinuxKernel }) => void): void {
  const kernel = realKernel();
  if ('reason' in kernel) {
    if (kernel.excusable) t.pass(`not on real KVM: ${kernel.reason}`);
    else t.fail(kernel.reason);
    return;
  }
  const s = new Scenario(kernel, alone) as Scenario & { readonly kernel: LinuxKernel };
  run(s);
  t.same(s.close(), []);
}
