import { KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES } from '../../lib/uapi.ts';
import type { Mirror, VmNote } from './mirror.ts';
import type { Fd, Num, Step } from './program.ts';

/** Slots that no random step names, to look with. */
const PROBE_SLOT = 300;
const BIND_SLOT = 301;
/** A guest page number, 4 GiB with pages of 4 KiB, that few random steps come near. */
const FAR = 1 << 20;
/** How much of what there is to look at. */
const SLOTS = 2;
const FILES = 3;

/** Steps that show what a program has left: taken addresses, bindings, dirty pages, attributes, files and their contents. */
export function* epilogue(mirror: Mirror): Generator<Step> {
  for (const fd of mirror.open('vm')) yield* lookAtVm(mirror, fd);
  for (const fd of mirror.open('file').slice(-FILES)) yield* lookAtFile(mirror, fd);
  for (const [map, { pages, alive }] of mirror.mappings.entries()) {
    if (!alive || pages > 1024) continue;
    yield { call: 'mincore', map, from: 0, length: pages };
    yield { call: 'peek', map, from: 0, length: Math.min(16, pages) };
  }
}

function* lookAtVm(mirror: Mirror, vm: Fd): Generator<Step> {
  const note = mirror.vm(vm) as VmNote;
  for (const slot of [...note.slots.values()].slice(0, SLOTS)) {
    if (slot.flags & KVM_MEM_LOG_DIRTY_PAGES)
      yield { call: 'getDirtyLog', vm, slot: ((slot.space << 16) | slot.id) >>> 0, bytes: 32 };
    const { page } = mirror.facts;
    const [first, end] = [slot.gpa / page, (slot.gpa + slot.size) / page];
    for (const at of [first - 1, end - 1, end]) {
      if (at >= 0 && Number.isSafeInteger(at * page)) yield* probe(vm, slot.space, at);
    }
    if (note.hasAgent) yield { call: 'guestRead', vm, page: first };
  }
}

/** Whether a page of the guest is taken: by trying to take it. */
function* probe(vm: Fd, space: number, page: number): Generator<Step> {
  const common = { call: 'setUserMemoryRegion2', vm, slot: PROBE_SLOT, space, flags: 0, gpa: page, hva: 0 } as const;
  yield { ...common, size: 1, file: 'none', offset: 0 };
  yield { ...common, size: 0, file: 'none', offset: 0 };
}

function* lookAtFile(mirror: Mirror, fd: Fd): Generator<Step> {
  yield { call: 'fstat', fd };
  yield { call: 'cachestat', fd, offset: 0, length: 0 };
  const vm = mirror.open('vm')[0];
  const pages = Number(mirror.file(fd)?.size ?? 0) / mirror.facts.page;
  if (!vm) return;
  for (const offset of new Set<Num>([0, Math.min(3, Math.ceil(pages) - 1)])) {
    const common = { vm, slot: BIND_SLOT, gpa: FAR, hva: 0, flags: KVM_MEM_GUEST_MEMFD } as const;
    yield { call: 'setUserMemoryRegion2', ...common, size: 1, file: fd, offset };
    yield { call: 'setUserMemoryRegion', ...common, flags: 0, size: 0 };
  }
}
