import { KVM_CREATE_GUEST_MEMFD, KVM_VM_TYPE_ARM_PROTECTED } from '../../../lib/uapi.ts';
import { createGmemOnVm, createGmemWithoutFds } from '../child_programs.ts';
import { mappable, noGmemFlags, protectedVm, since, swProtected } from '../needs.ts';
import { FILE_END, type Scenario, scenario, section } from '../scenario.ts';

const withFlags = (s: Scenario, vm: number, ...flags: (number | bigint)[]) =>
  flags.map((f) => s.createGmem(vm, s.P, f));

export const createGuestMemfd = section('KVM_CREATE_GUEST_MEMFD', [
  scenario(23, 'a NULL pointer is EFAULT', {
    given: (s) => s.vm(),
    when: (s, vm) => s.kernel.ioctl(vm, KVM_CREATE_GUEST_MEMFD, 0),
    expect: 'EFAULT',
  }),
  scenario(24, 'a size that is 0 or no multiple of a page is EINVAL', {
    given: (s) => s.vm(),
    when: (s, vm) => [0, 1, s.P - 1, s.P + 1, s.P / 2].map((size) => s.createGmem(vm, size)),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(25, 'a size that is negative as a signed number is EINVAL', {
    given: (s) => s.vm(),
    when: (s, vm) => [1n << 63n, 2n ** 64n - BigInt(s.P), -s.P, -1].map((size) => s.createGmem(vm, size)),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(26, 'the largest size succeeds: nothing is allocated', {
    given: (s) => s.vm(),
    when: (s, vm) => s.stat(s.createGmem(vm, FILE_END - BigInt(s.P))).size,
    expect: (s) => FILE_END - BigInt(s.P),
  }),
  scenario(27, 'the boundary sets FD_CLOEXEC on the new fd', {
    given: (s) => s.gmem(s.vm()),
    when: (s, file) => s.closesOnExec(file),
    expect: true,
  }),
  scenario(28, 'a default VM allows MMAP, INIT_SHARED and both', {
    needs: [since('6.18')],
    given: (s) => s.vm(),
    when: (s, vm) => withFlags(s, vm, 0, 1, 2, 3),
    expect: ['ok', 'ok', 'ok', 'ok'],
  }),
  scenario(29, 'a SW_PROTECTED VM allows MMAP, not INIT_SHARED', {
    needs: [swProtected, mappable],
    given: (s) => s.vm(1),
    when: (s, vm) => withFlags(s, vm, 0, 1, 2, 3),
    expect: ['ok', 'ok', 'EINVAL', 'EINVAL'],
  }),
  scenario('19 flags', 'before 6.18 there were no flags', {
    needs: [noGmemFlags],
    given: (s) => s.vm(),
    when: (s, vm) => withFlags(s, vm, 0, 1, 2, 3),
    expect: ['ok', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(30, 'flags nobody knows are EINVAL, over all 64 bits', {
    given: (s) => s.vm(),
    when: (s, vm) => withFlags(s, vm, 4, 8, 5, 1n << 32n, 1n << 63n, -1),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(31, 'size 0 with a bad flag is EINVAL', {
    given: (s) => s.vm(),
    when: (s, vm) => s.createGmem(vm, 0, 1n << 63n),
    expect: 'EINVAL',
  }),
  scenario(32, 'without a free fd: a bad size or flag is still EINVAL, a good one EMFILE', {
    when: (s) => s.inChild(createGmemWithoutFds, [], { descriptors: 64 }),
    expect: ['EINVAL', 'EINVAL', 'EMFILE'],
  }),
  scenario(33, 'a VM may have any number of them', {
    given: (s) => s.vm(),
    when: (s, vm) => new Set(Array.from({ length: 100 }, () => s.gmem(vm))).size,
    expect: 100,
  }),
  scenario(34, 'two of them have inodes and sizes of their own', {
    given: (s) => {
      const vm = s.vm();
      return { a: s.gmem(vm, 1), b: s.gmem(vm, 3) };
    },
    when: (s, { a, b }) => [s.stat(a).ino !== s.stat(b).ino, s.stat(a).size, s.stat(b).size],
    expect: (s) => [true, s.P, 3 * s.P],
  }),
  scenario(35, 'a child process cannot create one on its parent’s VM', {
    given: (s) => s.vm(),
    when: (s, vm) => s.inChild(createGmemOnVm, [vm]),
    expect: ['EIO'],
  }),
  scenario(36, 'there is no check of the VM’s type beyond the flags', {
    needs: [swProtected],
    when: (s) => [s.createGmem(s.vm(0), s.P), s.createGmem(s.vm(1), s.P)],
    expect: ['ok', 'ok'],
  }),
  scenario('17.1 create', 'a protected VM allows every flag', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) => withFlags(s, vm, 0, 1, 2, 3, 4),
    expect: ['ok', 'ok', 'ok', 'ok', 'EINVAL'],
  }),
]);
