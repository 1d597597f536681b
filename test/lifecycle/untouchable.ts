import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Kvm, type KvmError, type Vm } from '../../lib/index.ts';

// Every way to reach guest memory that the host must not touch. A wrong one ends this process by a signal.

const backend = process.argv[2] as 'kvm' | 'software';
const kvm = Kvm.open({ backend });
const P = kvm.pageSize;
const codes: Record<string, string> = {};

function attempt(what: string, call: () => unknown): void {
  try {
    call();
    codes[what] = 'ok';
  } catch (error) {
    codes[what] = (error as KvmError).code;
  }
}

/** Reads, writes and views a guest address in every way there is. */
function reach(what: string, vm: Vm, address: number): void {
  attempt(`${what}: read`, () => vm.memory.read(address, 16));
  attempt(`${what}: readInto`, () => vm.memory.readInto(address, new Uint8Array(16)));
  attempt(`${what}: write`, () => vm.memory.write(address, new Uint8Array(16).fill(7)));
  attempt(`${what}: view`, () => vm.memory.view(address, 16).fill(7));
}

{
  using vm = kvm.createVm();
  const shut = vm.createGuestMemfd({ size: 4 * P, mmap: true });
  vm.createMemslot({ address: 0, size: 4 * P, guestMemfd: shut });
  shut.allocate({ offset: 0, size: P });
  reach('not for the host, allocated', vm, 0);
  reach('not for the host, empty', vm, 2 * P);
  attempt('not for the host: bytes', () => shut.bytes().fill(1));
  attempt('not for the host: resident', () => shut.residentBytes());

  const open = vm.createGuestMemfd({ size: 4 * P, mmap: true, initShared: true });
  const slot = vm.createMemslot({ address: 8 * P, size: 4 * P, guestMemfd: open });
  const [bytes, view] = [open.bytes(), vm.memory.view(8 * P, 4 * P)];
  bytes.fill(1);
  open.punchHole();
  reach('punched', vm, 9 * P);
  attempt('punched: old views', () => bytes.fill(view[P] as number));
  reach('past the end', vm, 12 * P - 8);
  slot.remove();
  reach('slot removed', vm, 8 * P);
  attempt('slot removed: old views', () => view.fill(1));
  open.close();
  attempt('file closed: old views', () => bytes.fill(1));
}

// A file that somebody else cuts: only the copying calls can be safe, and have to be.
{
  const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
  const path = join(folder, 'cut');
  const vm = kvm.createVm();
  const memory = kvm.createHostMemory({ size: 4 * P, kind: 'file', path });
  vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory });
  const whole = kvm.createHostMemory({ size: 4 * P });
  vm.createMemslot({ address: 8 * P, size: 4 * P, hostMemory: whole });
  const window = memory.bytes();
  const fd = openSync(path, 'r+');
  ftruncateSync(fd, P);
  closeSync(fd);
  attempt('cut file: read what is left', () => vm.memory.read(0, P));
  attempt('cut file: read', () => vm.memory.read(P, 1));
  attempt('cut file: read across', () => vm.memory.read(0, 4 * P));
  attempt('cut file: readInto', () => vm.memory.readInto(2 * P, new Uint8Array(4)));
  attempt('cut file: write', () => vm.memory.write(P - 1, new Uint8Array(4)));
  attempt('cut file: write from it', () => vm.memory.write(8 * P, window));
  attempt('cut file: read into it', () => vm.memory.readInto(8 * P, window.subarray(P)));
  attempt('cut file: resident', () => memory.residentBytes());
  attempt('cut file: discard', () => memory.discard({ offset: 0, size: 4 * P }));
  vm.close();
  memory.close();
  rmSync(folder, { recursive: true });
}

if (kvm.vmTypes.has('sw-protected')) {
  using vm = kvm.createVm({ type: 'sw-protected' });
  const [memory, file] = [kvm.createHostMemory({ size: 4 * P }), vm.createGuestMemfd({ size: 4 * P })];
  vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory, guestMemfd: file });
  const view = vm.memory.view(P, P);
  vm.convertSync({ address: P, size: P }, 'private');
  reach('private', vm, P);
  reach('half private', vm, 2 * P - 8);
  attempt('private: old views', () => view.fill(1));
}

kvm.close();
console.log(JSON.stringify(codes));
