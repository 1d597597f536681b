// What a system call costs through the boundary and through the objects, against the same call in a C loop.
import { type GuestMemfd, type HostMemory, Kvm, type Vm } from '../lib/index.ts';
import { linuxKernel, uapi } from '../lib/kernel/index.ts';
import { nanoseconds, type Result, type Row, type Skipped, sideBySide, timed } from './measure.ts';
import { NO_COMPILER, Reference } from './reference.ts';

const PAGE = 4096;
const SLOT_SIZE = 1 << 20;
const PUNCH = uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE;
const ALLOCATE = uapi.FALLOC_FL_KEEP_SIZE;
const USER_MEMORY = 3;
const BAR = 1.1;
const ROUNDS = 201;

interface Case {
  /** As the C program knows it. */
  readonly name: string;
  readonly title: string;
  /** In one round, about 1 ms. */
  readonly calls: number;
  readonly boundary: (calls: number) => void;
  readonly objects: (calls: number) => void;
}

export async function benchCalls(): Promise<Result[]> {
  let kvm: Kvm;
  try {
    kvm = Kvm.open({ backend: 'kvm' });
  } catch (error) {
    return [skipped(`no KVM here: ${(error as Error).message.split('\n')[0]}`)];
  }
  try {
    const vm = kvm.createVm();
    if (!vm.capabilities.guestMemfd) return [skipped(`no guest_memfd on Linux ${kvm.kernelRelease}`)];
    return await measure(kvm, vm);
  } finally {
    kvm.close();
  }
}

async function measure(kvm: Kvm, vm: Vm): Promise<Result[]> {
  const mappable = vm.capabilities.guestMemfdMmap && vm.capabilities.guestMemfdInitShared;
  const file = vm.createGuestMemfd({ size: SLOT_SIZE, mmap: mappable, initShared: mappable });
  const memory = kvm.createHostMemory({ size: SLOT_SIZE });
  const reference = Reference.start('calls', [String(file.flags)]);
  if (!reference) return [skipped(NO_COMPILER)];
  const rows: Row[] = [];
  for (const { name, title, calls, boundary, objects } of cases(vm, file, memory)) {
    const [c, low, high] = await sideBySide(
      [() => reference.time(name, calls), () => timed(boundary, calls), () => timed(objects, calls)],
      ROUNDS,
    );
    if (!c || !low || !high) continue;
    const against = (time: number): string => `${nanoseconds(time)}, C ${nanoseconds(c.time)}`;
    rows.push(
      { name: `${title}, boundary`, value: low.ratio, unit: '× C', bar: BAR, detail: against(low.time) },
      { name: `${title}, objects`, value: high.ratio, unit: '× C', detail: against(high.time) },
    );
  }
  await reference.close();
  return rows;
}

/** The boundary works on a VM and a file of its own: what it does to them, the objects would not know. */
function cases(vm: Vm, file: GuestMemfd, memory: HostMemory): Case[] {
  const kernel = linuxKernel();
  const vmFd = kernel.createVm(kernel.openKvm(), 0);
  const fileFd = kernel.createGuestMemfd(vmFd, { size: SLOT_SIZE, flags: file.flags });
  const mapping = kernel.mmap({
    length: SLOT_SIZE,
    prot: uapi.PROT_READ | uapi.PROT_WRITE,
    flags: file.flags ? uapi.MAP_SHARED : uapi.MAP_PRIVATE | uapi.MAP_ANONYMOUS,
    fd: file.flags ? fileFd : -1,
    offset: 0,
  });
  const plain = { slot: 0, flags: 0, guestPhysAddr: 0, memorySize: SLOT_SIZE, userspaceAddr: memory.address };
  const none = { ...plain, memorySize: 0 };
  const bound = {
    ...plain,
    flags: uapi.KVM_MEM_GUEST_MEMFD,
    userspaceAddr: file.flags ? kernel.addressOf(mapping) : 0,
    guestMemfdOffset: 0,
    guestMemfd: fileFd,
  };
  const page = { offset: 0, size: PAGE };
  return [
    {
      name: 'check-extension',
      title: 'KVM_CHECK_EXTENSION',
      calls: 3000,
      boundary: (calls) => {
        for (let i = 0; i < calls; i++) must(kernel.checkExtension(vmFd, USER_MEMORY));
      },
      objects: (calls) => {
        for (let i = 0; i < calls; i++) vm.checkExtension(USER_MEMORY);
      },
    },
    {
      name: 'punch',
      title: 'punch 4 KiB (empty)',
      calls: 1500,
      boundary: (calls) => {
        for (let i = 0; i < calls; i++) must(kernel.fallocate(fileFd, PUNCH, 0, PAGE));
      },
      objects: (calls) => {
        for (let i = 0; i < calls; i++) file.punchHole(page);
      },
    },
    {
      name: 'allocate-punch',
      title: 'allocate + punch 4 KiB',
      calls: 250,
      boundary: (calls) => {
        for (let i = 0; i < calls; i++) {
          must(kernel.fallocate(fileFd, ALLOCATE, 0, PAGE));
          must(kernel.fallocate(fileFd, PUNCH, 0, PAGE));
        }
      },
      objects: (calls) => {
        for (let i = 0; i < calls; i++) {
          file.allocate(page);
          file.punchHole(page);
        }
      },
    },
    {
      name: 'plain-slot',
      title: 'add + delete a slot, plain',
      calls: 25,
      boundary: (calls) => {
        for (let i = 0; i < calls; i++) {
          must(kernel.setUserMemoryRegion(vmFd, plain));
          must(kernel.setUserMemoryRegion(vmFd, none));
        }
      },
      objects: (calls) => {
        for (let i = 0; i < calls; i++) {
          vm.createMemslot({ address: 0, size: SLOT_SIZE, hostMemory: memory }).remove();
        }
      },
    },
    {
      name: 'guest-memfd-slot',
      title: 'add + delete a slot, guest_memfd',
      calls: 25,
      boundary: (calls) => {
        for (let i = 0; i < calls; i++) {
          must(kernel.setUserMemoryRegion2(vmFd, bound));
          must(kernel.setUserMemoryRegion(vmFd, none));
        }
      },
      objects: (calls) => {
        for (let i = 0; i < calls; i++) vm.createMemslot({ address: 0, size: SLOT_SIZE, guestMemfd: file }).remove();
      },
    },
  ];
}

function must(result: number): void {
  if (result < 0) throw new Error(`a measured call failed: ${result}`);
}

function skipped(reason: string): Skipped {
  return { name: 'calls', skipped: reason };
}
