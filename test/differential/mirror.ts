import type { U64 } from '../../lib/kernel/kernel.ts';
import { GUEST_MEMFD_FLAG_MMAP } from '../../lib/uapi.ts';
import type { Outcome } from '../conformance/scenario.ts';
import {
  type ByGuest,
  type Facts,
  type Fd,
  isByGuest,
  isMappedPage,
  type Num,
  resolveNum,
  type Step,
} from './program.ts';
import type { World } from './world.ts';

export interface SlotNote {
  readonly space: number;
  readonly id: number;
  /** Bytes. */
  gpa: number;
  readonly size: number;
  readonly flags: number;
  /** Index of the mapping that it shows, if it shows one. */
  readonly mapping: number | null;
}

export interface VmNote {
  readonly type: U64;
  readonly slots: Map<number, SlotNote>;
  /** A guest agent lives there. */
  hasAgent: boolean;
  /** Why no guest may run there any more. */
  unfit: string | null;
  /** Pages a guest, or a pre-fault, found nothing behind: contract §13.4. */
  readonly mmio: Set<number>;
  readonly maps: Set<number>;
}

export interface FileNote {
  readonly kind: 'gmem' | 'memfd';
  size: U64;
  readonly flags: number;
}

export function slotKey({ space = 0, slot }: { readonly space?: number; readonly slot: number }): number {
  return (space << 16) | slot;
}

/**
 * What both kernels are known to hold, from the answers they agreed on: enough to keep away from what may not be sent, and to say at
 * the end of a program what there is to look at.
 */
export class Mirror {
  readonly facts: Facts;
  readonly world: World;
  /** By fd number of `world`. */
  readonly #vms = new Map<number, VmNote>();
  readonly #files = new Map<number, FileNote>();
  readonly #vcpus = new Map<number, VmNote>();
  readonly mappings: { pages: number; alive: boolean }[] = [];
  readonly #agents = new Map<number, VmNote>();
  #duplicated = -1;

  constructor(world: World, facts: Facts) {
    this.world = world;
    this.facts = facts;
  }

  vm(fd: Fd): VmNote | undefined {
    return this.#vms.get(this.world.number(fd));
  }

  file(fd: Fd): FileNote | undefined {
    return this.#files.get(this.world.number(fd));
  }

  vcpu(fd: Fd): VmNote | undefined {
    return this.#vcpus.get(this.world.number(fd));
  }

  /** No name was given to an agent's CPU, but its number may be one that a closed file had. */
  mayBeAgent(fd: Fd): boolean {
    const number = this.world.number(fd);
    const known = this.#vcpus.has(number) || this.#files.has(number) || this.#vms.has(number);
    return this.#agents.size > 0 && !known && number >= 0;
  }

  mayBeVcpu(fd: Fd): boolean {
    return this.#vcpus.has(this.world.number(fd)) || this.mayBeAgent(fd);
  }

  value(num: Num, fileSize: U64 = 0): U64 {
    return resolveNum(num, this.facts, fileSize);
  }

  /** The VM whose agent a guest step would reach: that of the VM the name stood for when the agent began. */
  agentVm(fd: Fd): VmNote | undefined {
    return this.#agents.get(this.world.index(fd)) ?? this.vm(fd);
  }

  /** A number of a step, which may be said in terms of the size of the file that the step is about. */
  valueIn(step: Step, num: Num): U64 {
    return resolveNum(num, this.facts, this.sizeFor(step));
  }

  sizeFor(step: Step): U64 {
    if ('file' in step) return this.file(step.file)?.size ?? 0;
    return 'fd' in step ? (this.file(step.fd)?.size ?? 0) : 0;
  }

  /** Names of the fds that are open and of this kind, one name for each number. */
  open(kind: 'vm' | 'file'): Fd[] {
    const notes = kind === 'vm' ? this.#vms : this.#files;
    const seen = new Set<number>();
    const names: Fd[] = [];
    for (let i = this.world.count(kind) - 1; i >= 0; i--) {
      const name: Fd = `${kind}${i}`;
      const number = this.world.number(name);
      if (notes.has(number) && !seen.has(number)) names.unshift(name);
      seen.add(number);
    }
    return names;
  }

  /** Before the step: what it is about may be gone afterwards. */
  before(step: Step): void {
    // Afterwards the name may stand for the copy.
    if (step.call === 'dup') this.#duplicated = this.world.number(step.fd);
    if (!isByGuest(step)) return;
    const vm = this.agentVm(step.vm);
    if (!vm) return;
    vm.hasAgent = true;
    this.#agents.set(this.world.index(step.vm), vm);
  }

  /** After a step that both carried out alike. */
  note(step: Step, outcome: Outcome): void {
    const failed = typeof outcome === 'number' && outcome < 0;
    if (isByGuest(step)) this.#noteAccess(step, outcome);
    if (step.call === 'preFaultMemory') this.#notePreFault(step);
    if (failed) return;
    switch (step.call) {
      case 'createVm': {
        const empty = {
          slots: new Map(),
          hasAgent: false,
          unfit: null,
          mmio: new Set<number>(),
          maps: new Set<number>(),
        };
        this.#vms.set(this.#last('vm'), { type: this.value(step.type), ...empty });
        break;
      }
      case 'createGuestMemfd':
        this.#files.set(this.#last('file'), { kind: 'gmem', size: this.value(step.size), flags: step.flags });
        break;
      case 'memfdCreate':
        this.#files.set(this.#last('file'), { kind: 'memfd', size: 0, flags: GUEST_MEMFD_FLAG_MMAP });
        break;
      case 'createVcpu': {
        const vm = this.vm(step.vm);
        if (vm) this.#vcpus.set(this.#last('vcpu'), vm);
        break;
      }
      case 'dup':
        this.#noteDup(step.fd);
        break;
      case 'close': {
        const number = this.world.number(step.fd);
        for (const notes of [this.#vms, this.#files, this.#vcpus]) notes.delete(number);
        break;
      }
      case 'ftruncate': {
        const file = this.file(step.fd);
        if (file) file.size = this.value(step.length, file.size);
        break;
      }
      case 'fallocate': {
        const file = this.file(step.fd);
        const end = Number(this.value(step.offset, file?.size)) + Number(this.value(step.length, file?.size));
        if (file?.kind === 'memfd' && step.mode === 0) file.size = Math.max(end, Number(file.size));
        break;
      }
      case 'setUserMemoryRegion':
      case 'setUserMemoryRegion2':
        this.#noteRegion(step);
        break;
      case 'mmap':
        this.mappings.push({
          pages: Math.ceil(Number(this.valueIn(step, step.length)) / this.facts.page),
          alive: true,
        });
        break;
      case 'munmap':
        this.#noteUnmap(step.map);
    }
  }

  #last(kind: 'vm' | 'file' | 'vcpu'): number {
    return this.world.number(`${kind}${this.world.count(kind) - 1}`);
  }

  #noteDup(fd: Fd): void {
    const kind = fd.startsWith('vm') ? 'vm' : fd.startsWith('vcpu') ? 'vcpu' : fd.startsWith('file') ? 'file' : null;
    if (!kind) return;
    const to = this.#last(kind);
    // The number may have been reused for a file of another kind since it was named.
    for (const notes of [this.#vms, this.#files, this.#vcpus] as Map<number, unknown>[]) {
      const found = notes.get(this.#duplicated);
      if (found) notes.set(to, found);
    }
  }

  #noteRegion(step: Step & { call: 'setUserMemoryRegion' | 'setUserMemoryRegion2' }): void {
    const vm = this.vm(step.vm);
    if (!vm) return;
    const size = Number(this.valueIn(step, step.size));
    const key = slotKey(step);
    const old = vm.slots.get(key);
    if (size === 0) {
      vm.slots.delete(key);
      return;
    }
    const gpa = Number(this.valueIn(step, step.gpa));
    if (old) {
      vm.slots.set(key, { ...old, gpa, flags: step.flags });
      return;
    }
    const mapping = isMappedPage(step.hva) ? this.world.mappingIndex(step.hva.mapping) : null;
    vm.slots.set(key, { space: step.space ?? 0, id: step.slot, gpa, size, flags: step.flags, mapping });
    this.#noteHost(vm, step, size);
  }

  /** A guest may only reach memory that the program mapped. */
  #noteHost(vm: VmNote, { hva }: Step & { call: 'setUserMemoryRegion' | 'setUserMemoryRegion2' }, size: number): void {
    if (!isMappedPage(hva)) {
      const address = this.value(hva);
      const nowhere = typeof address === 'number' && address + size <= 0x10000;
      if (!nowhere) vm.unfit = 'a slot of unknown host memory';
      return;
    }
    const index = this.world.mappingIndex(hva.mapping);
    const mapping = this.mappings[index];
    if (!mapping?.alive) {
      if (size > 0x10000) vm.unfit = 'a slot of unknown host memory';
      return;
    }
    vm.maps.add(index);
    if (hva.page + size / this.facts.page > mapping.pages) vm.unfit = 'a slot past its mapping';
  }

  #noteUnmap(map: number): void {
    const index = this.world.mappingIndex(map);
    const mapping = this.mappings[index];
    if (mapping) mapping.alive = false;
    // What the process maps there next is not the program's.
    for (const vm of new Set([...this.#vms.values(), ...this.#vcpus.values(), ...this.#agents.values()])) {
      if (vm.maps.has(index)) vm.unfit = 'a slot of unmapped memory';
    }
  }

  #noteAccess(step: ByGuest, outcome: Outcome): void {
    const vm = this.agentVm(step.vm);
    if (Array.isArray(outcome) && String(outcome[0]).startsWith('MMIO')) vm?.mmio.add(step.page);
    else if (typeof outcome === 'number' && outcome >= 0) vm?.mmio.delete(step.page);
  }

  #notePreFault(step: Step & { call: 'preFaultMemory' }): void {
    const vm = this.vcpu(step.vcpu);
    const first = Math.floor(Number(this.value(step.gpa)) / this.facts.page);
    const pages = Math.min(64, Number(this.value(step.size)) / this.facts.page);
    for (let i = 0; i < pages; i++) vm?.mmio.add(first + i);
  }
}
