import {
  KVM_MEM_READONLY,
  KVM_VM_TYPE_ARM_PROTECTED,
  MADV_DONTNEED,
  MAP_PRIVATE,
  PROT_NONE,
  PROT_READ,
} from '../../../lib/uapi.ts';
import { initialise } from '../../../lib/vcpu_setup.ts';
import { useVcpu } from '../child_programs.ts';
import { codePage, fault, type Guest, mmioRead, mmioWrite, unexplained } from '../guest.ts';
import {
  arm64,
  emulated,
  gmemOnDefaultVm,
  hardwarePaging,
  machineCode,
  mappable,
  mmioCache,
  ordinaryHost,
  protectedHost,
  protectedVm,
  shareable,
  swProtected,
  x86,
} from '../needs.ts';
import { INIT_SHARED, MMAP, type Scenario, scenario, section } from '../scenario.ts';

const PUNCH = 3;
const KVM_RUN = 0xae80;

/** A guest with four pages of host memory in slot 0, from guest page 0 on. */
const hostMemory =
  (flags = 0, prot?: number) =>
  (s: Scenario) => {
    const vm = s.vm();
    const memory = s.anonymous(4);
    for (let page = 0; page < 4; page++) s.put(memory, page, 10 + page);
    if (prot !== undefined) s.kernel.mprotect(memory, 0, 4 * s.P, prot);
    s.slot(vm, { pages: 4, hva: s.kernel.addressOf(memory), flags });
    return { vm, memory, guest: s.guest(vm) };
  };

/** A guest with four pages of a guest_memfd in slot 0, and other memory, full of 66, as the host's side of it. */
const boundFile = (flags: number, type?: number) => (s: Scenario) => {
  const vm = s.vm(type);
  const file = s.gmem(vm, 4, flags);
  const memory = s.anonymous(4);
  for (let page = 0; page < 4; page++) s.put(memory, page, 66);
  s.bind(vm, { pages: 4, file, hva: s.kernel.addressOf(memory) });
  return { vm, file, memory, guest: s.guest(vm) };
};

/** Runs that end before the guest does: of a first vCPU, then of one created after it. */
const lateVcpu = (s: Scenario, vm: number) =>
  [0, 1].map((id) => {
    const vcpu = s.vcpu(vm, id);
    initialise(s.kernel, vm, vcpu);
    return s.kernel.run(vcpu, 0);
  });

/** The same with the file's own mapping as the host's side: what a VMM sets up. */
const sharedFile = (s: Scenario) => {
  const vm = s.vm();
  const file = s.gmem(vm, 4, MMAP | INIT_SHARED);
  const mapping = s.map(file, { pages: 4 });
  s.bind(vm, { pages: 4, file, hva: s.kernel.addressOf(mapping) });
  return { vm, file, mapping, guest: s.guest(vm) };
};

/** A guest of a SW_PROTECTED VM with four pages of host memory and no guest_memfd in slot 0; pages 1 and 2 are private. */
const privateWithoutFile =
  (flags = 0) =>
  (s: Scenario) => {
    const vm = s.vm(1);
    s.slot(vm, { pages: 4, hva: s.kernel.addressOf(s.anonymous(4)), flags });
    const guest = s.guest(vm);
    s.setAttributes(vm, s.P, 2 * s.P);
    return { vm, guest };
  };

const setPrivate = (s: Scenario, vm: number, page: number) => s.setAttributes(vm, page * s.P, s.P);
const setShared = (s: Scenario, vm: number, page: number) => s.setAttributes(vm, page * s.P, s.P, 0);

export const guestAccess = section('Guest access', [
  scenario('13.3 host memory', 'guest and host see each other’s writes to a slot’s host memory', {
    given: hostMemory(),
    when: (s, { guest, memory }) => [guest.get(1), guest.put(2, 77), s.get(memory, 2), guest.get(2), guest.get(3)],
    expect: [11, 0, 77, 77, 13],
  }),
  scenario('13.3 no slot', 'no slot: the host is asked, and its answer is what the guest reads', {
    given: hostMemory(),
    when: (_, { guest }) => {
      const asked = guest.get(4);
      guest.answer(99);
      return [asked, guest.again(), guest.put(5, 7), guest.again(), guest.get(0)];
    },
    expect: [mmioRead(4), 99, mmioWrite(5, 7), 0, 10],
  }),
  scenario('13.3 created later', 'a slot that is created over what was MMIO is memory', {
    given: hostMemory(),
    when: (s, { vm, guest }) => [
      guest.get(8),
      s.slot(vm, { slot: 1, at: 8, hva: s.kernel.addressOf(s.anonymous(1)) }),
      guest.put(8, 5),
      guest.get(8),
      s.remove(vm, 1),
      guest.get(8),
    ],
    expect: [mmioRead(8), 0, 0, 5, 0, mmioRead(8)],
  }),
  scenario(184, 'a read-only slot: reads are the memory’s, a write is the host’s to answer and changes nothing', {
    given: hostMemory(KVM_MEM_READONLY),
    when: (s, { guest, memory }) => [guest.get(1), guest.put(1, 7), guest.again(), guest.get(1), s.get(memory, 1)],
    expect: [11, mmioWrite(1, 7), 0, 11, 11],
  }),
  scenario('184 mapping', 'a read-only slot needs no writable host memory', {
    given: hostMemory(KVM_MEM_READONLY, PROT_READ),
    when: (_, { guest }) => [guest.get(1), guest.put(1, 7)],
    expect: [11, mmioWrite(1, 7)],
  }),
  scenario(185, 'a slot whose host memory is not mapped: EFAULT, and kvm_run does not say why', {
    needs: [hardwarePaging],
    given: hostMemory(),
    when: (s, { guest, memory }) => [s.munmap(memory), guest.get(1), guest.again(), guest.put(1, 7)],
    expect: [0, unexplained, unexplained, unexplained],
  }),
  scenario('13.1 PROT_NONE', 'host memory without access: EFAULT, and kvm_run does not say why', {
    needs: [hardwarePaging],
    given: hostMemory(0, PROT_NONE),
    when: (_, { guest }) => [guest.get(1), guest.put(1, 7)],
    expect: [unexplained, unexplained],
  }),
  scenario('13.1 PROT_READ', 'host memory that is read-only: the guest reads it, and its write is EFAULT', {
    needs: [hardwarePaging],
    given: hostMemory(0, PROT_READ),
    when: (_, { guest }) => [guest.get(1), guest.put(1, 7), guest.get(1)],
    expect: [11, unexplained, 11],
  }),
  scenario('13.1 retry', 'after the cause is gone the same access proceeds', {
    needs: [hardwarePaging],
    given: hostMemory(0, PROT_NONE),
    when: (s, { guest, memory }) => [guest.get(1), s.kernel.mprotect(memory, 0, 4 * s.P, PROT_READ), guest.again()],
    expect: [unexplained, 0, 11],
  }),
  scenario('13.6 not mapped', 'where guest code is emulated, a slot whose host memory is not mapped is MMIO', {
    needs: [emulated],
    given: hostMemory(),
    when: (s, { guest, memory }) => [s.munmap(memory), guest.get(1), guest.put(2, 7)],
    expect: [0, mmioRead(1), mmioWrite(2, 7)],
  }),
  scenario(187, 'a file without MMAP on an ordinary VM: the guest has the host memory, and a punch changes nothing', {
    needs: [x86, gmemOnDefaultVm],
    given: boundFile(0),
    when: (s, { file, memory, guest }) => [
      guest.put(1, 7),
      s.get(memory, 1),
      s.cached(file),
      s.fallocate(file, PUNCH, 0, 4),
      guest.get(1),
    ],
    expect: [0, 7, 0, 0, 7],
  }),
  scenario('187 INIT_SHARED', 'the same with INIT_SHARED alone', {
    needs: [x86, shareable],
    given: boundFile(INIT_SHARED),
    when: (s, { memory, guest }) => [guest.put(1, 7), s.get(memory, 1)],
    expect: [0, 7],
  }),
  scenario(188, 'a file with MMAP alone: the guest has the file, which the host may map and not touch', {
    needs: [hardwarePaging, mappable, gmemOnDefaultVm],
    given: boundFile(MMAP),
    when: (s, { file, memory, guest }) => [
      guest.get(1),
      guest.put(1, 7),
      s.get(memory, 1),
      s.get(s.map(file, { pages: 4 }), 1),
      guest.get(1),
      s.cached(file),
    ],
    expect: [0, 0, 66, 'EFAULT', 7, 1],
  }),
  scenario('13.3 gmem shared', 'a file with MMAP and INIT_SHARED: guest and host have the same memory', {
    needs: [shareable],
    given: sharedFile,
    when: (s, { mapping, guest }) => [
      guest.get(1),
      guest.put(1, 7),
      s.get(mapping, 1),
      s.put(mapping, 2, 8),
      guest.get(2),
    ],
    expect: [0, 0, 7, 1, 8],
  }),
  scenario('13.3 gmem shared, other hva', 'what the guest writes is the file’s, whatever the slot’s host address', {
    needs: [hardwarePaging, shareable],
    given: boundFile(MMAP | INIT_SHARED),
    when: (s, { file, memory, guest }) => [guest.put(1, 7), s.get(memory, 1), s.get(s.map(file, { pages: 4 }), 1)],
    expect: [0, 66, 7],
  }),
  scenario('13.5 emulated', 'where guest code is emulated, a slot’s host address counts and its file does not', {
    needs: [emulated, shareable],
    given: boundFile(MMAP | INIT_SHARED),
    when: (s, { file, memory, guest }) => [guest.get(1), guest.put(1, 7), s.get(memory, 1), s.cached(file)],
    expect: [66, 0, 7, 0],
  }),
  scenario(190, 'a punch takes the page from the guest, which then reads zeros', {
    needs: [shareable],
    given: sharedFile,
    when: (s, { file, guest }) => [guest.put(1, 7), guest.get(1), s.fallocate(file, PUNCH, 1, 1), guest.get(1)],
    expect: [0, 7, 0, 0],
  }),
  scenario('190 MMAP', 'the same for a file with MMAP alone', {
    needs: [hardwarePaging, mappable, gmemOnDefaultVm],
    given: boundFile(MMAP),
    when: (s, { file, guest }) => [guest.put(1, 7), guest.get(1), s.fallocate(file, PUNCH, 1, 1), guest.get(1)],
    expect: [0, 7, 0, 0],
  }),
  scenario(191, 'a file with MMAP that is closed: a memory fault, of the page, not private', {
    needs: [hardwarePaging, mappable, gmemOnDefaultVm],
    given: boundFile(MMAP),
    when: (s, { file, guest }) => [
      guest.put(1, 7),
      s.closeFd(file),
      guest.get(1, 0x234),
      guest.put(2, 7),
      guest.again(),
    ],
    expect: [0, 0, fault('shared', 1), fault('shared', 2), fault('shared', 2)],
  }),
  scenario(163, 'a file whose fd is closed lives on in a mapping, also for the guest', {
    needs: [hardwarePaging, shareable],
    given: sharedFile,
    when: (s, { file, mapping, guest }) => [
      guest.put(1, 7),
      s.closeFd(file),
      guest.get(1),
      s.munmap(mapping),
      guest.get(1),
    ],
    expect: [0, 0, 7, 0, fault('shared', 1)],
  }),
  scenario('11 dup, guest', 'a file whose first fd is closed lives on in a duplicate, also for the guest', {
    needs: [hardwarePaging, mappable, gmemOnDefaultVm],
    given: boundFile(MMAP),
    when: (s, { file, guest }) => {
      const copy = s.dup(file);
      return [guest.put(1, 7), s.closeFd(file), guest.get(1), s.closeFd(copy), guest.get(1)];
    },
    expect: [0, 0, 7, 0, fault('shared', 1)],
  }),
]);

export const privateAccess = section('Guest access to private memory', [
  scenario(193, 'a shared page is the host memory’s, a private one the file’s, which starts with zeros', {
    needs: [swProtected, hardwarePaging],
    given: boundFile(0, 1),
    when: (s, { vm, memory, guest }) => [
      guest.get(1),
      guest.put(1, 67),
      s.get(memory, 1),
      setPrivate(s, vm, 1),
      guest.get(1),
    ],
    expect: [66, 0, 67, 0, 0],
  }),
  scenario(194, 'either side keeps its bytes while the page is on the other', {
    needs: [swProtected, hardwarePaging],
    given: boundFile(0, 1),
    when: (s, { vm, memory, guest }) => [
      guest.put(1, 67),
      setPrivate(s, vm, 1),
      guest.put(1, 68),
      s.get(memory, 1),
      setShared(s, vm, 1),
      guest.get(1),
      setPrivate(s, vm, 1),
      guest.get(1),
    ],
    expect: [0, 0, 0, 67, 0, 67, 0, 68],
  }),
  scenario('13.3 private punch', 'a private page is zeros again after a punch', {
    needs: [swProtected, hardwarePaging],
    given: boundFile(0, 1),
    when: (s, { vm, file, guest }) => [
      setPrivate(s, vm, 1),
      guest.put(1, 68),
      s.cached(file),
      s.fallocate(file, PUNCH, 1, 1),
      s.cached(file),
      guest.get(1),
      s.cached(file),
    ],
    expect: [0, 0, 1, 0, 0, 0, 1],
  }),
  scenario(196, 'private, and the slot has no file: a memory fault for a private page', {
    needs: [swProtected, hardwarePaging],
    given: privateWithoutFile(),
    when: (_, { guest }) => [guest.get(0), guest.get(1), guest.put(2, 7), guest.get(3)],
    expect: [0, fault('private', 1), fault('private', 2), 0],
  }),
  scenario('13.1 repaired', 'once the page is shared again the same access proceeds', {
    needs: [swProtected, hardwarePaging],
    given: privateWithoutFile(),
    when: (s, { vm, guest }) => [guest.put(1, 7), guest.again(), setShared(s, vm, 1), guest.again(), guest.get(1)],
    expect: [fault('private', 1), fault('private', 1), 0, 0, 7],
  }),
  scenario(197, 'private, and the slot is read-only without a file: a memory fault, not MMIO', {
    needs: [swProtected, hardwarePaging],
    given: privateWithoutFile(KVM_MEM_READONLY),
    when: (_, { guest }) => [guest.put(1, 7), guest.put(0, 7)],
    expect: [fault('private', 1), mmioWrite(0, 7)],
  }),
  scenario('13.3 private, no slot', 'private, and no slot is there: a memory fault', {
    needs: [swProtected, hardwarePaging],
    given: privateWithoutFile(),
    when: (s, { vm, guest }) => [setPrivate(s, vm, 9), guest.get(9), guest.put(9, 7)],
    expect: [0, fault('private', 9), fault('private', 9)],
  }),
  scenario(199, 'private, and the slot is deleted: a memory fault', {
    needs: [swProtected, hardwarePaging],
    given: boundFile(0, 1),
    when: (s, { vm, guest }) => [setPrivate(s, vm, 1), guest.put(1, 7), s.remove(vm, 0), guest.get(1)],
    expect: [0, 0, 0, fault('private', 1)],
  }),
  scenario('199 closed', 'private, and the file is closed: a memory fault', {
    needs: [swProtected, hardwarePaging],
    given: boundFile(0, 1),
    when: (s, { vm, file, guest }) => [
      setPrivate(s, vm, 1),
      guest.put(1, 7),
      s.closeFd(file),
      guest.get(1),
      guest.get(0),
    ],
    expect: [0, 0, 0, fault('private', 1), 66],
  }),
  scenario(200, 'private is the page with the code: a memory fault there', {
    needs: [swProtected, hardwarePaging],
    given: privateWithoutFile(),
    when: (s, { vm, guest }) => [
      setPrivate(s, vm, codePage(s)),
      guest.get(0),
      setShared(s, vm, codePage(s)),
      guest.again(),
    ],
    expect: (s) => [0, fault('private', codePage(s)), 0, 0],
  }),
  scenario('13.3 address', 'a memory fault names the page, whatever byte of it was touched', {
    needs: [swProtected, hardwarePaging],
    given: privateWithoutFile(),
    when: (_, { guest }) => [guest.get(1, 0x345), guest.put(2, 7, 0xfff)],
    expect: [fault('private', 1), fault('private', 2)],
  }),
  scenario(202, 'a file with MMAP on a VM with private memory: the same byte as shared and as private', {
    needs: [swProtected, hardwarePaging, mappable],
    given: boundFile(MMAP, 1),
    when: (s, { vm, guest }) => [
      guest.put(1, 7),
      setPrivate(s, vm, 1),
      guest.get(1),
      guest.put(1, 8),
      setShared(s, vm, 1),
      guest.get(1),
    ],
    expect: [0, 0, 7, 0, 0, 8],
  }),
  scenario('13.3 orphan', 'the file with MMAP is closed: the memory fault says how the page is accessed', {
    needs: [swProtected, hardwarePaging, mappable],
    given: boundFile(MMAP, 1),
    when: (s, { vm, file, guest }) => [setPrivate(s, vm, 1), s.closeFd(file), guest.get(0), guest.get(1)],
    expect: [0, 0, fault('shared', 0), fault('private', 1)],
  }),
  scenario(203, 'a host address that cannot be used spoils shared pages only', {
    needs: [swProtected, hardwarePaging],
    given: boundFile(0, 1),
    when: (s, { vm, memory, guest }) => [
      setPrivate(s, vm, 1),
      s.munmap(memory),
      guest.get(0),
      guest.put(1, 7),
      guest.get(1),
    ],
    expect: [0, 0, unexplained, 0, 7],
  }),
  scenario(179, 'attributes belong to the VM: a slot that is created again is private where it was', {
    needs: [swProtected, hardwarePaging],
    given: boundFile(0, 1),
    when: (s, { vm, file, memory, guest }) => [
      setPrivate(s, vm, 1),
      guest.put(1, 68),
      s.remove(vm, 0),
      s.bind(vm, { pages: 4, file, hva: s.kernel.addressOf(memory) }),
      guest.get(1),
      guest.get(0),
    ],
    expect: [0, 0, 0, 0, 68, 66],
  }),
  scenario('13.4 MMIO', 'a page that was MMIO stays MMIO when it becomes private', {
    needs: [mmioCache, swProtected, hardwarePaging],
    given: privateWithoutFile(),
    when: (s, { vm, guest }) => [guest.get(9), setPrivate(s, vm, 9), guest.get(9)],
    expect: [mmioRead(9), 0, mmioRead(9)],
  }),
  scenario(205, 'a page that was MMIO and became private: after a slot is created, a memory fault that says shared', {
    needs: [mmioCache, swProtected, hardwarePaging],
    given: privateWithoutFile(),
    when: (s, { vm, guest }) => [guest.get(9), setPrivate(s, vm, 9), s.slot(vm, { slot: 1, at: 64 }), guest.get(9)],
    expect: [mmioRead(9), 0, 0, fault('shared', 9)],
  }),
]);

/** A guest of a protected VM, with host memory in slot 0 and a file's own mapping behind slot 1. */
const protectedGuest = (s: Scenario) => {
  const vm = s.vm(KVM_VM_TYPE_ARM_PROTECTED);
  const [file, memory] = [s.gmem(vm, 4, MMAP | INIT_SHARED), s.anonymous(4)];
  s.slot(vm, { pages: 4, hva: s.kernel.addressOf(memory) });
  s.bind(vm, { slot: 1, at: 8, pages: 4, file, hva: s.kernel.addressOf(s.map(file, { pages: 4 })) });
  return { vm, memory, guest: s.guest(vm) };
};

/** A guest of a protected VM with four pages of a memfd. */
const protectedMemfd = (s: Scenario) => {
  const vm = s.vm(KVM_VM_TYPE_ARM_PROTECTED);
  const file = s.memfd(4);
  const memory = s.map(file, { pages: 4 });
  s.slot(vm, { pages: 4, hva: s.kernel.addressOf(memory) });
  return { vm, file, memory, guest: s.guest(vm) };
};
/** pread(2) of a page's first byte. */
const hostReads = (s: Scenario, file: number, page: number): number | undefined => {
  const byte = new Uint8Array(1);
  return s.kernel.pread(file, byte, page * s.P) === 1 ? byte[0] : undefined;
};

const [MEMINFO, SHARE, UNSHARE] = [0xc600_0002n, 0xc600_0003n, 0xc600_0004n];
/** The guest lets the host have one of its pages, or no more. */
const share = (s: Scenario, guest: Guest, page: number) => guest.hypercall(SHARE, BigInt(page * s.P));
const unshare = (s: Scenario, guest: Guest, page: number) => guest.hypercall(UNSHARE, BigInt(page * s.P));

export const protectedAccess = section('Guest access in a protected VM (arm64)', [
  scenario(254, 'what the guest has touched is its own; what it has not is the host’s as before', {
    needs: [protectedVm],
    given: protectedGuest,
    when: (s, { memory, guest }) => [
      s.put(memory, 1, 66),
      guest.get(1),
      [s.get(memory, 1), s.put(memory, 1, 67)],
      guest.get(1),
      [s.put(memory, 2, 68), s.get(memory, 2)],
    ],
    expect: [1, 66, ['EFAULT', 'EFAULT'], 66, [1, 68]],
  }),
  scenario('254 close', 'a closed VM gives its pages back, as zeros; what it shared as it was', {
    needs: [protectedVm],
    given: (s) => {
      const vm = s.vm(KVM_VM_TYPE_ARM_PROTECTED);
      const memory = s.anonymous(4);
      s.slot(vm, { pages: 4, hva: s.kernel.addressOf(memory) });
      return { vm, memory, guest: s.guest(vm) };
    },
    when: (s, { vm, memory, guest }) => {
      const used = [guest.put(1, 7), guest.put(2, 8), share(s, guest, 2)];
      s.closeFd(guest.vcpu);
      s.closeFd(vm);
      return [used, s.get(memory, 1), s.get(memory, 2)];
    },
    expect: [[0, 0, 0], 0, 8],
  }),
  scenario(256, 'host memory works, a file’s mapping is EIO, and kvm_run does not say why', {
    needs: [protectedVm],
    given: protectedGuest,
    when: (_, { guest }) => [guest.put(1, 7), guest.get(1), guest.get(8), guest.put(9, 7)],
    expect: [0, 7, ['EIO', 0], ['EIO', 0]],
  }),
  scenario('17.1 other hva', 'a file behind a slot is ignored: the guest has the host memory', {
    needs: [protectedVm],
    given: boundFile(MMAP, KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, { file, memory, guest }) => [guest.get(1), guest.put(1, 7), s.get(memory, 1), s.cached(file)],
    expect: [66, 0, 'EFAULT', 0],
  }),
  scenario('17.1 hva', 'host memory that is not mapped, or not writable, is EFAULT also for a read', {
    needs: [protectedVm],
    given: protectedGuest,
    when: (s, { memory, guest }) => [
      s.kernel.mprotect(memory, 0, 4 * s.P, PROT_READ),
      guest.get(1),
      s.munmap(memory),
      guest.get(1),
    ],
    expect: [0, unexplained, 0, unexplained],
  }),
  scenario('17.1 munmap', 'what the guest has stays its own when the host discards or unmaps it', {
    needs: [protectedVm],
    given: protectedGuest,
    when: (s, { memory, guest }) => [
      guest.put(1, 7),
      s.advise(memory, 0, 4, MADV_DONTNEED),
      [s.get(memory, 1), s.put(memory, 1, 9), guest.get(1)],
      s.munmap(memory),
      guest.get(1),
      guest.get(2),
    ],
    expect: [0, 0, [0, 1, 7], 0, 7, unexplained],
  }),
  scenario(257, 'a page that another guest has, or this one elsewhere, is EPERM', {
    needs: [protectedVm],
    given: protectedGuest,
    when: (s, { vm, memory, guest }) => {
      const hva = s.kernel.addressOf(memory);
      const slot = s.slot(vm, { slot: 2, at: 64, pages: 4, hva });
      const others = [s.vm(KVM_VM_TYPE_ARM_PROTECTED), s.vm()].map((other) => {
        s.slot(other, { pages: 4, hva });
        return s.guest(other);
      });
      return [
        [slot, guest.put(1, 7), guest.get(65), guest.get(66), guest.get(2)],
        others.map((other) => other.get(1)),
        [share(s, guest, 1), guest.get(65)],
        others.map((other) => other.get(1)),
        guest.get(1),
      ];
    },
    expect: [
      [0, 0, ['EPERM', 0], 0, ['EPERM', 0]],
      [
        ['EPERM', 0],
        ['EPERM', 0],
      ],
      [0, ['EPERM', 0]],
      [
        ['EPERM', 0],
        ['EPERM', 0],
      ],
      7,
    ],
  }),
  scenario(259, 'the guest shares a page with the host, and takes it back', {
    needs: [protectedVm],
    given: protectedGuest,
    when: (s, { memory, guest }) => [
      [guest.put(1, 7), s.get(memory, 1)],
      [share(s, guest, 1), s.get(memory, 1), s.put(memory, 1, 9), guest.get(1)],
      [unshare(s, guest, 1), s.get(memory, 1), guest.get(1)],
      [share(s, guest, 2), s.put(memory, 2, 5), guest.get(2)],
    ],
    expect: [
      [0, 'EFAULT'],
      [0, 7, 1, 9],
      [0, 'EFAULT', 9],
      [0, 1, 5],
    ],
  }),
  scenario('259 refusals', 'sharing twice, taking back what is not shared, half a page, or one that cannot be: -3', {
    needs: [protectedVm],
    given: protectedGuest,
    when: (s, { guest }) => [
      [share(s, guest, 1), share(s, guest, 1)],
      [unshare(s, guest, 2), guest.get(2), unshare(s, guest, 2), unshare(s, guest, 100)],
      guest.hypercall(SHARE, BigInt(3 * s.P + 8)),
      guest.hypercall(SHARE, BigInt(3 * s.P), 1n),
      guest.hypercall(SHARE, 1n << 55n),
      guest.hypercall(MEMINFO, 1n),
      share(s, guest, 8),
    ],
    expect: [[0, -3n], [-3n, 0, -3n, -3n], -3n, -3n, -3n, -3n, ['EIO', 0]],
  }),
  scenario('259 discovery', 'the guest is told which of these calls there are, and how large a page is', {
    needs: [protectedVm],
    given: (s) => s.guest(s.vm(KVM_VM_TYPE_ARM_PROTECTED)),
    when: (s, guest) => [guest.hypercall(0x8600_0000n), guest.hypercall(MEMINFO) === BigInt(s.P)],
    expect: [0b1_1101, true],
  }),
  scenario('259 ordinary', 'an ordinary guest has no such calls', {
    needs: [arm64],
    given: hostMemory(),
    when: (s, { guest }) => [guest.hypercall(MEMINFO), share(s, guest, 1), unshare(s, guest, 1)],
    expect: [-1n, -1n, -1n],
  }),
  scenario(260, 'the host’s kernel takes a page that it needs, as zeros, and the guest has lost it', {
    needs: [protectedVm],
    given: protectedMemfd,
    when: (s, { file, guest }) => [
      [guest.put(1, 7), guest.put(2, 8)],
      hostReads(s, file, 1),
      guest.get(1),
      guest.put(1, 7),
      guest.get(2),
    ],
    expect: [[0, 0], 0, unexplained, unexplained, 8],
  }),
  scenario('260 another', 'another guest can take what was lost, and keeps it when the first VM closes', {
    needs: [protectedVm],
    given: protectedMemfd,
    when: (s, { vm, file, memory, guest }) => {
      const lost = [guest.put(1, 7), hostReads(s, file, 1)];
      const other = s.vm(KVM_VM_TYPE_ARM_PROTECTED);
      s.slot(other, { pages: 4, hva: s.kernel.addressOf(memory) });
      const second = s.guest(other);
      const taken = [second.put(1, 9), guest.get(1), s.get(memory, 1)];
      s.closeFd(guest.vcpu);
      s.closeFd(vm);
      return [lost, taken, s.get(memory, 1), second.get(1)];
    },
    expect: [[0, 0], [0, unexplained, 'EFAULT'], 'EFAULT', 9],
  }),
  scenario('260 private', 'a private mapping of the file does not show it either', {
    needs: [protectedVm],
    given: protectedMemfd,
    when: (s, { file, guest }) => {
      const mapping = s.map(file, { pages: 4, flags: MAP_PRIVATE });
      return [guest.put(1, 7), s.get(mapping, 1), guest.get(1), s.get(mapping, 2)];
    },
    expect: [0, 'EFAULT', 7, 0],
  }),
  scenario('260 part', 'a file that ends inside a page: its kernel clears the rest, and takes the page', {
    needs: [protectedVm],
    given: protectedMemfd,
    when: (s, { file, guest }) => [guest.put(1, 7), s.kernel.ftruncate(file, s.P + 100), guest.get(1), guest.get(0)],
    expect: [0, 0, unexplained, 0],
  }),
  scenario(253, 'once it has run, its slots can be neither deleted nor moved; more can be created', {
    needs: [protectedVm],
    given: (s) => {
      const vm = s.vm(KVM_VM_TYPE_ARM_PROTECTED);
      const hva = s.kernel.addressOf(s.anonymous(4));
      s.slot(vm, { pages: 4, hva });
      // b .
      s.kernel.run(s.guest(vm, [0x00, 0x00, 0x00, 0x14]).vcpu, 100);
      return { vm, hva };
    },
    when: (s, { vm, hva }) => [s.remove(vm, 0), s.slot(vm, { at: 64, pages: 4, hva }), s.slot(vm, { slot: 1, at: 64 })],
    expect: ['EPERM', 'EPERM', 0],
  }),
]);

/** rep outsb; hlt */
const REP_OUTSB = [0xf3, 0x6e, 0xf4];

export const runs = section('KVM_RUN', [
  scenario(206, 'string output is emulated: it sends the host memory’s byte, not the file’s', {
    needs: [machineCode, shareable],
    given: (s) => {
      const vm = s.vm();
      const file = s.gmem(vm, 4, MMAP | INIT_SHARED);
      s.put(s.map(file, { pages: 4 }), 1, 7);
      const memory = s.anonymous(4);
      s.put(memory, 1, 66);
      s.bind(vm, { pages: 4, file, hva: s.kernel.addressOf(memory) });
      return s.guest(vm, REP_OUTSB);
    },
    when: (s, guest) => guest.execute({ rcx: 1n, rdx: 0x80n, rsi: BigInt(s.P) }, 1),
    expect: ['port', 0x80, 66],
  }),
  scenario(
    '13.1 immediate_exit',
    'immediate_exit ends a run at once and leaves the exit reason; what is pending is completed',
    {
      given: hostMemory(),
      when: (_, { guest }) => {
        const asked = guest.get(4);
        guest.answer(99);
        guest.immediateExit = true;
        const stopped = guest.again();
        guest.immediateExit = false;
        guest.answer(98);
        return [asked, stopped, guest.again()];
      },
      expect: [mmioRead(4), ['EINTR', 6], 99],
    },
  ),
  scenario('13.1 kick', 'a kick ends the next run', {
    given: hostMemory(),
    when: (s, { guest }) => {
      const asked = guest.get(4);
      s.kernel.kick(guest.vcpu);
      return [asked, s.kernel.run(guest.vcpu, 1000), guest.get(0)];
    },
    expect: [mmioRead(4), 'EINTR', 10],
  }),
  scenario(208, 'KVM_RUN as a plain ioctl, with an argument or without: EINVAL', {
    given: hostMemory(),
    when: (s, { guest }) => [s.kernel.ioctl(guest.vcpu, KVM_RUN, 1), s.kernel.ioctl(guest.vcpu, KVM_RUN, 0)],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario('208 child', 'a vCPU is EIO in another process', {
    given: (s) => s.vcpu(s.vm()),
    when: (s, vcpu) => s.inChild(useVcpu, [vcpu]),
    expect: ['EIO', 'EIO'],
  }),
  scenario(209, 'arm64: a vCPU that was not initialised is ENOEXEC', {
    needs: [arm64],
    given: (s) => s.vcpu(s.vm()),
    when: (s, vcpu) => [s.kernel.run(vcpu, 1000), s.kernel.getOneReg(vcpu, 0x6030_0000_0010_0040n, new Uint8Array(8))],
    expect: ['ENOEXEC', 'ENOEXEC'],
  }),
  scenario('13.1 late vCPU', 'a vCPU that is created when another has run', {
    needs: [ordinaryHost],
    given: (s) => s.vm(),
    when: lateVcpu,
    expect: ['EINTR', 'EINTR'],
  }),
  scenario('13.1 late vCPU, protected host', 'arm64 pKVM host: a vCPU that is created when another has run is EINVAL', {
    needs: [protectedHost],
    given: (s) => s.vm(),
    when: (s, vm) => [...lateVcpu(s, vm), s.kernel.run(s.vcpu(vm, 2), 0)],
    expect: ['EINTR', 'EINVAL', 'ENOEXEC'],
  }),
]);
