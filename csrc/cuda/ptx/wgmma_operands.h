// Operand lists of wgmma's inline assembly, for wgmma.h.
//
// AF_WGMMA_D<r> are r accumulator registers as operands, AF_WGMMA_S<r> their names %0..%(r - 1).
// AF_WGMMA_EACH_N(X) is X(n, operands, names, names of the seven operands after them) for each N.
#pragma once

#define AF_WGMMA_D4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define AF_WGMMA_S4 "%0, %1, %2, %3"
#define AF_WGMMA_D8 AF_WGMMA_D4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define AF_WGMMA_S8 AF_WGMMA_S4 ", %4, %5, %6, %7"
#define AF_WGMMA_D16                                                                       \
  AF_WGMMA_D8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
      "+f"(d[14]), "+f"(d[15])
#define AF_WGMMA_S16 AF_WGMMA_S8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define AF_WGMMA_D24                                                                          \
  AF_WGMMA_D16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), \
      "+f"(d[22]), "+f"(d[23])
#define AF_WGMMA_S24 AF_WGMMA_S16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define AF_WGMMA_D32                                                                          \
  AF_WGMMA_D24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
      "+f"(d[30]), "+f"(d[31])
#define AF_WGMMA_S32 AF_WGMMA_S24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define AF_WGMMA_D40                                                                          \
  AF_WGMMA_D32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), \
      "+f"(d[38]), "+f"(d[39])
#define AF_WGMMA_S40 AF_WGMMA_S32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define AF_WGMMA_D48                                                                          \
  AF_WGMMA_D40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), \
      "+f"(d[46]), "+f"(d[47])
#define AF_WGMMA_S48 AF_WGMMA_S40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define AF_WGMMA_D56                                                                          \
  AF_WGMMA_D48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
      "+f"(d[54]), "+f"(d[55])
#define AF_WGMMA_S56 AF_WGMMA_S48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define AF_WGMMA_D64                                                                          \
  AF_WGMMA_D56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), \
      "+f"(d[62]), "+f"(d[63])
#define AF_WGMMA_S64 AF_WGMMA_S56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define AF_WGMMA_D72                                                                          \
  AF_WGMMA_D64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), \
      "+f"(d[70]), "+f"(d[71])
#define AF_WGMMA_S72 AF_WGMMA_S64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define AF_WGMMA_D80                                                                          \
  AF_WGMMA_D72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), \
      "+f"(d[78]), "+f"(d[79])
#define AF_WGMMA_S80 AF_WGMMA_S72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define AF_WGMMA_D88                                                                          \
  AF_WGMMA_D80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), \
      "+f"(d[86]), "+f"(d[87])
#define AF_WGMMA_S88 AF_WGMMA_S80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define AF_WGMMA_D96                                                                          \
  AF_WGMMA_D88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), \
      "+f"(d[94]), "+f"(d[95])
#define AF_WGMMA_S96 AF_WGMMA_S88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define AF_WGMMA_D104                                                                           \
  AF_WGMMA_D96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), \
      "+f"(d[102]), "+f"(d[103])
#define AF_WGMMA_S104 AF_WGMMA_S96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define AF_WGMMA_D112                                                                  \
  AF_WGMMA_D104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), \
      "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define AF_WGMMA_S112 AF_WGMMA_S104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define AF_WGMMA_D120                                                                  \
  AF_WGMMA_D112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), \
      "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define AF_WGMMA_S120 AF_WGMMA_S112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define AF_WGMMA_D128                                                                  \
  AF_WGMMA_D120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), \
      "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define AF_WGMMA_S128 AF_WGMMA_S120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define AF_WGMMA_EACH_N(X)                                                                     \
  X(8, AF_WGMMA_D4, AF_WGMMA_S4, "%4", "%5", "%6", "%7", "%8", "%9", "%10")                    \
  X(16, AF_WGMMA_D8, AF_WGMMA_S8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")               \
  X(32, AF_WGMMA_D16, AF_WGMMA_S16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")           \
  X(48, AF_WGMMA_D24, AF_WGMMA_S24, "%24", "%25", "%26", "%27", "%28", "%29", "%30")           \
  X(64, AF_WGMMA_D32, AF_WGMMA_S32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")           \
  X(80, AF_WGMMA_D40, AF_WGMMA_S40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")           \
  X(96, AF_WGMMA_D48, AF_WGMMA_S48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")           \
  X(112, AF_WGMMA_D56, AF_WGMMA_S56, "%56", "%57", "%58", "%59", "%60", "%61", "%62")          \
  X(128, AF_WGMMA_D64, AF_WGMMA_S64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")          \
  X(144, AF_WGMMA_D72, AF_WGMMA_S72, "%72", "%73", "%74", "%75", "%76", "%77", "%78")          \
  X(160, AF_WGMMA_D80, AF_WGMMA_S80, "%80", "%81", "%82", "%83", "%84", "%85", "%86")          \
  X(176, AF_WGMMA_D88, AF_WGMMA_S88, "%88", "%89", "%90", "%91", "%92", "%93", "%94")          \
  X(192, AF_WGMMA_D96, AF_WGMMA_S96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")       \
  X(208, AF_WGMMA_D104, AF_WGMMA_S104, "%104", "%105", "%106", "%107", "%108", "%109", "%110") \
  X(224, AF_WGMMA_D112, AF_WGMMA_S112, "%112", "%113", "%114", "%115", "%116", "%117", "%118") \
  X(240, AF_WGMMA_D120, AF_WGMMA_S120, "%120", "%121", "%122", "%123", "%124", "%125", "%126") \
  X(256, AF_WGMMA_D128, AF_WGMMA_S128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
